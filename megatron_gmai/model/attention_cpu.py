"""Attention over the segments of a pack on a CPU: one node of the graph for all of them.

torch's kernels run segment by segment, as scaled_dot_product_attention would call them; here they
read the pack and their results are written into it, where autograd would cut and join copies.
Shapes: T tokens of a pack, L of a segment, A query heads, G key-value groups, D head size.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], causal: bool
) -> Tensor:
    """[T, A, D], [T, G, D], [T, G, D] -> [T, A, D]; no attention across segments."""
    out: Tensor = _Attend.apply(query, key, value, lengths, causal)
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], causal: bool
    ) -> Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        statistics = []
        for q, k, v, o in _segments(lengths, query, key, value, out):
            attended, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, is_causal=causal
            )
            o.copy_(attended)
            statistics.append(logsumexp)
        ctx.save_for_backward(query, key, value, out, *statistics)
        ctx.lengths, ctx.causal = lengths, causal
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *statistics = ctx.saved_tensors
        inputs = (query, key, value)
        found = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        parts = _segments(ctx.lengths, gradient, *inputs, out, *found)
        for (*given, dq, dk, dv), logsumexp in zip(parts, statistics, strict=True):
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *given, logsumexp, 0.0, ctx.causal
            )
            for target, source in zip((dq, dk, dv), gradients, strict=True):
                target.copy_(source)
        return *found, None, None


def _segments(lengths: Sequence[int], *packs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each segment of packs [T, A|G, D], as the kernels take it: views [1, A|G, L, D]."""
    views = (pack.transpose(0, 1)[None].split(lengths, dim=2) for pack in packs)
    return zip(*views, strict=True)
