"""Cross-entropy over a vocabulary that is split over tensor-parallel ranks.

    loss_t = log(sum_v exp(x_tv)) - x_t,label(t)
    dx_tv = g_t * (exp(x_tv) / sum_v exp(x_tv) - [v = label(t)])

Each rank reduces its columns to three numbers a token: the maximum m, the sum s of exp(x - m), and
the label's logit z (0 where the label lies elsewhere). One all-gather joins them:
log-sum-exp = M + log(sum over ranks of s * exp(m - M)), with M the largest m.
Shoeybi et al., "Megatron-LM", 2019, section 3, reduces three times for the same result.
Legend: T tokens, V columns held by this rank, W ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gmai_kernels.ops  # noqa: F401  (registers the operators)
from gmai_kernels import cross_entropy_torch
from gmai_kernels.checks import check_dtype, check_matrix
from gmai_kernels.dispatch import chosen_implementation
from gmai_kernels.vocabulary import (
    IGNORED,
    AllGather,
    check_labels,
    check_vocabulary,
    combine,
    local_targets,
    to_device,
    true_columns,
)


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    all_gather: AllGather | None = None,
) -> Tensor:
    """Return the loss of every token, fp32 [T], 0 where the label is `ignore_index`.

    logits: [T, V] fp32, bf16 or fp16, the columns [vocab_start, vocab_start + V) of the vocabulary.
    **The backward pass overwrites them with their gradient**; use each loss for one backward pass.
    labels: int64 [T], global ids, on the logits' device or on the CPU. Prefer the CPU: there they
    are checked at once, and the check of labels on a GPU can only stop the process later.
    vocab_size: the true global size; columns past it never count and get gradient 0; it may be left
    out where one rank holds everything. all_gather: maps a [T, 3] fp32 tensor to [W, T, 3],
    stacking all ranks' tensors; called once. Raises ValueError for wrong shapes, dtypes or labels,
    before any launch. Nothing waits for the GPU.
    """
    implementation = chosen_implementation(logits)
    check_matrix("logits", logits, "[T, V]")
    check_dtype("logits", logits, float64=implementation == "reference")
    vocab_size = check_vocabulary(logits.shape[1], vocab_start, vocab_size, all_gather is not None)
    check_labels(labels, logits.shape[0], vocab_size, ignore_index, logits.device)
    columns = true_columns(logits.shape[1], vocab_start, vocab_size)
    target = local_targets(labels, vocab_start, columns, ignore_index)
    target = to_device(target, logits.device)
    if implementation == "reference":
        return cross_entropy_reference(logits, target, columns, all_gather)
    loss: Tensor = _CrossEntropy.apply(logits, target, columns, all_gather, implementation)
    return loss


def cross_entropy_reference(
    logits: Tensor, target: Tensor, columns: int, all_gather: AllGather | None
) -> Tensor:
    """The formula in plain torch, in fp32 or fp64; it leaves the logits alone.

    The collective has no gradient of its own: the sum of exp(x - lse) has the value of the local
    share of the softmax and the gradient of the log-sum-exp, so the loss is its value plus a term
    that is 0.
    """
    x = logits[:, :columns].to(torch.promote_types(logits.dtype, torch.float32))
    stats = cross_entropy_torch.statistics(x.detach(), target, columns)
    lse, label_logit = combine(stats, all_gather)
    picked = torch.where(target >= 0, _pick(x, target), 0.0)
    slope = torch.exp(x - lse[:, None]).sum(-1) - picked
    return torch.where(target == IGNORED, 0.0, lse - label_logit + slope - slope.detach())


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        columns: int,
        all_gather: AllGather | None,
        implementation: str,
    ) -> Tensor:
        stats = torch.ops.gmai_kernels.cross_entropy_statistics(
            logits, target, columns, implementation
        )
        lse, label_logit = combine(stats, all_gather)
        ctx.save_for_backward(logits, target, lse)
        ctx.columns, ctx.implementation = columns, implementation
        return (lse - label_logit).masked_fill_(target == IGNORED, 0.0)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, lse = ctx.saved_tensors
        scale = dloss.float().masked_fill(target == IGNORED, 0.0)
        torch.ops.gmai_kernels.cross_entropy_gradient_(
            logits, target, lse, scale, ctx.columns, ctx.implementation
        )
        torch.autograd.graph.increment_version(logits)  # a second backward pass fails, not lies
        return logits, None, None, None, None


def _pick(x: Tensor, target: Tensor) -> Tensor:
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0])
    return x.gather(1, target.clamp_min(0)[:, None])[:, 0]
