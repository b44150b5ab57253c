"""Attention over a pack on a CPU against one call a segment, with its gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_gmai.model.attention_cpu import attend_on_cpu

LENGTHS = (5, 1, 9)


def by_segment(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], causal: bool
) -> Tensor:
    parts = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_attend_to_themselves(causal: bool, dtype: torch.dtype) -> None:
    joined = torch.randn(sum(LENGTHS), 8, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(sum(LENGTHS), 4, 16, dtype=dtype)
    found = []
    ways: tuple[Callable[..., Tensor], ...] = (attend_on_cpu, by_segment)
    for attend in ways:
        joined.grad = None
        views = joined.split((4, 2, 2), dim=1)  # as of the joined projection
        out = attend(*views, LENGTHS, causal)
        (out * weight).sum().backward()
        found.append((out.detach(), joined.grad))
    rounding = (0.02, 0.03) if dtype is torch.bfloat16 else (None, None)
    torch.testing.assert_close(found[0], found[1], rtol=rounding[0], atol=rounding[1])
