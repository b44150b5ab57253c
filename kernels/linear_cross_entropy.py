"""Output layer and cross-entropy in one op: the full logits never exist.

    x = hidden weight^T    loss as in cross_entropy.py
    dhidden = dx weight    dweight = dx^T hidden

Tokens without a label are left out first: they cost nothing. The others go through in chunks. A
chunk's logits are made, turned into their gradient in place (for an incoming gradient of 1) and
used for both products at once, in the forward pass; the backward pass only scales. Scaling is exact
for dhidden, one factor a row, and for dweight when all supervised tokens share one factor, which
every mean or sum of the loss gives. For any other incoming gradient the backward pass repeats the
chunks with the true factors for dweight.

On a GPU the logits and their gradient have the input's dtype, which its tensor cores want; dhidden
and dweight are fp32 until they are scaled, so that each is rounded once. On a CPU everything but
the results is fp32, and the weight is converted in blocks of rows.
Legend: T tokens, S supervised tokens, H hidden size, V vocabulary rows held by this rank, C tokens
of one chunk, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gmai_kernels.checks import check_dtype, check_matrix, check_same, check_weight
from gmai_kernels.cross_entropy import backend, cross_entropy_reference
from gmai_kernels.dispatch import chosen_implementation
from gmai_kernels.vocabulary import (
    IGNORED,
    AllGather,
    check_labels,
    check_vocabulary,
    combine,
    local_targets,
    true_columns,
)

Collective = Callable[[Tensor], Tensor]
CPU_CHUNK = 384  # tokens; more raises the memory, fewer slows the products
GPU_CHUNK = 2048  # tokens; every chunk re-reads the weight and re-writes dweight, so large ones pay
CPU_FEW_TOKENS = 256  # fewer may leave a thread with fewer than four: see _hidden_product
CPU_WEIGHT_ROWS = 512  # of a block of the weight on a CPU; 16 for each token if those are more
ROW_ALIGNMENT = 64  # elements: rows of a chunk start on 128 bytes also for an odd vocabulary


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    all_gather: AllGather | None = None,
    reduce_hidden_grad: Collective | None = None,
    gather_hidden: Collective | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return the cross-entropy of `hidden @ weight.T` for every token, fp32 [T], 0 where ignored.

    hidden: [T, H] fp32, bf16 or fp16. weight: [V, H], the rows [vocab_start, vocab_start + V) of
    the output layer, same dtype, contiguous; its gradient is summed in fp32, and skipped when the
    weight does not require one. labels, vocab_size, ignore_index, all_gather: as in
    `vocab_parallel_cross_entropy`; all_gather is called once a chunk, in order, on every rank.

    reduce_hidden_grad: sums the hidden gradient [T, H] over the tensor-parallel ranks (all-reduce).
    gather_hidden: for sequence-parallel input; maps this rank's hidden [T / W, H] to [T, H]. Then
    reduce_hidden_grad is the matching reduce-scatter [T, H] -> [T / W, H]. Both get and return
    tensors that need no gradient. labels always hold all T tokens.
    chunk_size: tokens whose logits are held at once; the default is 384 on a CPU, 2048 on a GPU.
    Raises ValueError for wrong shapes, dtypes or labels, before any launch.
    """
    vocab_size = _check(
        hidden, weight, vocab_start, vocab_size, all_gather, reduce_hidden_grad, chunk_size
    )
    if gather_hidden is not None and reduce_hidden_grad is None:
        raise ValueError("reduce_hidden_grad: needed with gather_hidden; pass the reduce-scatter")
    tokens = labels.numel() if gather_hidden is not None else hidden.shape[0]
    check_labels(labels, tokens, vocab_size, ignore_index, hidden.device)
    columns = true_columns(weight.shape[0], vocab_start, vocab_size)
    plan = _Plan(
        target=local_targets(labels, vocab_start, columns, ignore_index),
        columns=columns,
        all_gather=all_gather,
        chunk=chunk_size or (GPU_CHUNK if hidden.is_cuda else CPU_CHUNK),
    )
    if reduce_hidden_grad is not None:
        hidden = _Gather.apply(hidden, gather_hidden, reduce_hidden_grad)
    if hidden.shape[0] != tokens:
        raise ValueError(f"gather_hidden: returned {hidden.shape[0]} tokens for {tokens} labels")
    implementation = chosen_implementation(hidden)
    if implementation == "reference":
        logits = hidden @ weight.T
        return cross_entropy_reference(logits, plan.target, columns, all_gather)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, plan, backend(implementation))
    return loss


def _check(
    hidden: Tensor,
    weight: Tensor,
    vocab_start: int,
    vocab_size: int | None,
    all_gather: AllGather | None,
    reduce_hidden_grad: Collective | None,
    chunk_size: int | None,
) -> int:
    """Return the true global vocabulary size; raise ValueError for a wrong argument."""
    check_matrix("hidden", hidden, "[T, H]")
    check_dtype("hidden", hidden, float64=chosen_implementation(hidden) == "reference")
    check_same("weight", weight, "hidden", hidden)
    check_matrix("weight", weight, "[V, H]")
    check_weight(weight, (weight.shape[0], hidden.shape[1]))
    if all_gather is not None and reduce_hidden_grad is None:
        raise ValueError("reduce_hidden_grad: needed with all_gather; pass the all-reduce")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: {chunk_size} is not positive")
    return check_vocabulary(weight.shape[0], vocab_start, vocab_size, all_gather is not None)


@dataclass(frozen=True)
class _Plan:
    target: Tensor  # int64 [T], columns of this rank, ELSEWHERE or IGNORED
    columns: int  # true vocabulary columns of this rank
    all_gather: AllGather | None
    chunk: int


class _Gather(torch.autograd.Function):
    """Gather sequence-parallel hidden states, and reduce their gradient over the ranks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gather: Collective | None, reduce: Collective) -> Tensor:
        ctx.reduce = reduce
        return hidden.view_as(hidden) if gather is None else gather(hidden)

    @staticmethod
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.reduce(dhidden), None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, plan: _Plan, ops: ModuleType) -> Tensor:
        rows = (plan.target != IGNORED).nonzero()[:, 0]  # [S]
        ones = torch.ones(rows.shape[0], dtype=torch.float32, device=rows.device)
        ctx.save_for_backward(hidden, weight, rows)
        ctx.plan, ctx.ops = plan, ops
        loss, *ctx.grads = _run_chunks(
            hidden, weight, rows, ones, plan, ops, ctx.needs_input_grad[:2]
        )
        return torch.zeros_like(plan.target, dtype=torch.float32).index_copy_(0, rows, loss)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, rows = ctx.saved_tensors
        need = ctx.needs_input_grad[:2]
        scale = dloss.float()[rows]
        grads, ctx.grads = ctx.grads, None  # handed over: they are changed below
        factor = _common_factor(scale) if need[1] else 1.0
        dhidden, dweight = grads or (None, None)
        if dhidden is not None:
            dhidden = _scaled(dhidden, scale[:, None], hidden)
        if grads is None or factor is None:  # a second backward pass, or factors differ by token
            dweight = grads = None
            missing = need[0] and dhidden is None, need[1]
            _, scaled, dweight = _run_chunks(
                hidden, weight, rows, scale, ctx.plan, ctx.ops, missing
            )
            dhidden = dhidden if scaled is None else scaled.to(hidden.dtype)
            factor = 1.0
        if dweight is not None:
            dweight = _scaled(dweight, factor, weight)
        if dhidden is not None and len(rows) < len(hidden):
            dhidden = torch.zeros_like(hidden).index_copy_(0, rows, dhidden)
        return dhidden, dweight, None, None


def _run_chunks(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    scale: Tensor,
    plan: _Plan,
    ops: ModuleType,
    need: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (loss [S], dhidden [S, H] or None, dweight [V, H] or None), all in fp32.

    `scale` [S] is the incoming gradient of the loss.
    """
    target = plan.target
    if len(rows) < len(hidden):
        hidden, target = hidden[rows], target[rows]
    loss = torch.empty(len(rows), dtype=torch.float32, device=hidden.device)
    dhidden = torch.empty(hidden.shape, device=hidden.device) if need[0] else None
    dweight: Tensor | None = None
    dtype = hidden.dtype if hidden.is_cuda else torch.float32
    buffer = _logits_buffer(min(plan.chunk, len(rows)), weight.shape[0], dtype, hidden.device)
    for start in range(0, len(rows), plan.chunk):
        part = slice(start, min(start + plan.chunk, len(rows)))
        states = hidden[part].to(dtype)  # [C, H]
        logits = _logits(states, weight, buffer[: part.stop - start])  # [C, V]
        lse, label_logit = combine(
            ops.statistics(logits, target[part], plan.columns), plan.all_gather
        )
        loss[part] = lse - label_logit
        if not any(need):
            continue
        ops.gradient_(logits, target[part], lse, scale[part], plan.columns)
        if dhidden is not None:
            _hidden_product(logits, weight, dhidden[part])
        if need[1]:
            dweight = _add_product(dweight, logits, states)
    if not need[1]:
        return loss, dhidden, None
    return loss, dhidden, torch.zeros_like(weight).float() if dweight is None else dweight


def _logits_buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an empty [rows, columns] matrix, its row stride a multiple of ROW_ALIGNMENT."""
    stride = -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return torch.empty(rows, stride, dtype=dtype, device=device)[:, :columns]


def _logits(states: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Set out [C, V] to states weight^T, and return it."""
    if states.dtype == weight.dtype:
        return torch.mm(states, weight.T, out=out)
    for part, rows in _blocks_in_fp32(weight, len(states)):
        torch.mm(states, rows.T, out=out[:, part])
    return out


def _hidden_product(dlogits: Tensor, weight: Tensor, out: Tensor) -> None:
    """Set out [C, H], fp32, to dlogits weight.

    Where a CPU's thread has fewer than four tokens, its library adds the V terms of an element one
    after the other, which loses two of fp32's seven digits; sums over short blocks lose none.
    """
    if dlogits.dtype != torch.float32:
        torch.mm(dlogits, weight, out_dtype=torch.float32, out=out)
    elif dlogits.is_cuda or (weight.dtype == torch.float32 and len(dlogits) >= CPU_FEW_TOKENS):
        torch.mm(dlogits, weight, out=out)
    else:
        out.zero_()
        for part, rows in _blocks_in_fp32(weight, len(dlogits)):
            out += dlogits[:, part] @ rows


def _blocks_in_fp32(weight: Tensor, tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of the weight's rows, converted: the CPU has no products of mixed dtypes.

    They are short for few tokens, where precision needs it, and long where time is at stake.
    """
    step = max(CPU_WEIGHT_ROWS, 16 * tokens)
    for start in range(0, len(weight), step):
        part = slice(start, min(start + step, len(weight)))
        yield part, weight[part].float()


def _add_product(total: Tensor | None, dlogits: Tensor, states: Tensor) -> Tensor:
    """Return total + dlogits^T states in fp32 [V, H], added inside the product."""
    left = dlogits.T
    if dlogits.dtype == torch.float32:
        return left @ states if total is None else total.addmm_(left, states)
    if total is None:
        return torch.mm(left, states, out_dtype=torch.float32)
    return torch.addmm(total, left, states, out_dtype=torch.float32, out=total)


def _scaled(gradient: Tensor, factor: float | Tensor, like: Tensor) -> Tensor:
    """Return factor * gradient in the dtype of `like`: in place if it can be, else in one pass."""
    if gradient.dtype == like.dtype:
        return gradient if isinstance(factor, float) and factor == 1.0 else gradient.mul_(factor)
    out = torch.empty(gradient.shape, dtype=like.dtype, device=like.device)
    return torch.mul(gradient, factor, out=out)


def _common_factor(scale: Tensor) -> float | None:
    """Return the value that all entries of `scale` share, or None."""
    if len(scale) == 0:
        return 1.0
    low, high = torch.stack(scale.aminmax()).tolist()
    return low if low == high else None
