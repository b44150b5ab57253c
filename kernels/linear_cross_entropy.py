"""Output layer and cross-entropy in one op: the full logits never exist.

    x = hidden weight^T    loss as in cross_entropy.py
    dhidden = dx weight    dweight = dx^T hidden

Tokens without a label are left out first, where labels on the CPU tell which they are: they cost
nothing then. The others go through in chunks. A chunk's logits are made, turned into their gradient
in place (for an incoming gradient of 1) and used for both products at once, in the forward pass;
the backward pass only scales. Scaling is exact for dhidden, one factor a row, and for dweight when
all supervised tokens share one factor, which every mean or sum of the loss gives. For any other
incoming gradient the backward pass repeats the chunks with the true factors for dweight. Nothing
here waits for a GPU, so all that depends on values is decided by what the host knows.

On a GPU the logits and their gradient have the input's dtype, which its tensor cores want; dhidden
and dweight are fp32 until they are scaled, so that each is rounded once. On a CPU everything but
the results is fp32, and the weight is converted in blocks of rows.
Legend: T tokens, S tokens that go through the chunks, H hidden size, V vocabulary rows held by this
rank, C tokens of one chunk, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gmai_kernels.ops  # noqa: F401  (registers the operators)
from gmai_kernels.checks import check_dtype, check_matrix, check_same, check_weight
from gmai_kernels.cross_entropy import cross_entropy_reference
from gmai_kernels.dispatch import chosen_implementation
from gmai_kernels.vocabulary import (
    IGNORED,
    AllGather,
    check_labels,
    check_vocabulary,
    combine,
    local_targets,
    readable,
    to_device,
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
    Labels on the CPU save the work for tokens without one; all ranks give them in the same place.

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
    target = local_targets(labels, vocab_start, columns, ignore_index)
    rows = (labels != ignore_index).nonzero()[:, 0] if readable(labels) else None
    implementation = chosen_implementation(hidden)
    on_cpu = hidden.device.type == "cpu"
    plan = _Plan(
        target=to_device(target, hidden.device),
        rows=None if rows is None else to_device(rows, hidden.device),
        columns=columns,
        all_gather=all_gather,
        chunk=chunk_size or (CPU_CHUNK if on_cpu else GPU_CHUNK),
        dtype=torch.float32 if on_cpu else hidden.dtype,
        implementation=implementation,
    )
    if reduce_hidden_grad is not None:
        hidden = _Gather.apply(hidden, gather_hidden, reduce_hidden_grad)
    if hidden.shape[0] != tokens:
        raise ValueError(f"gather_hidden: returned {hidden.shape[0]} tokens for {tokens} labels")
    if implementation == "reference":
        logits = hidden @ weight.T
        return cross_entropy_reference(logits, plan.target, columns, all_gather)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, plan)
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
    rows: Tensor | None  # int64 [S], the tokens that go through the chunks; None: all do
    columns: int  # true vocabulary columns of this rank
    all_gather: AllGather | None
    chunk: int
    dtype: torch.dtype  # of logits and their gradient
    implementation: str

    def chosen(self, values: Tensor) -> Tensor:
        """[T, ...] -> [S, ...]."""
        return values if self.rows is None else values[self.rows]

    def spread(self, values: Tensor) -> Tensor:
        """[S, ...] -> [T, ...], 0 for tokens that were left out."""
        if self.rows is None or len(self.rows) == len(self.target):
            return values
        out = values.new_zeros(len(self.target), *values.shape[1:])
        return out.index_copy_(0, self.rows, values)


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
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, plan: _Plan) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.plan = plan
        # Tokens without a label that go through with the others have the factor 0.
        ones = (plan.chosen(plan.target) != IGNORED).float()
        loss, *ctx.grads = _run_chunks(hidden, weight, ones, plan, ctx.needs_input_grad[:2])
        return plan.spread(loss)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        plan, need = ctx.plan, ctx.needs_input_grad[:2]
        factor = _common_factor(dloss, plan) if need[1] else 1.0
        ignored = plan.chosen(plan.target) == IGNORED
        scale = plan.chosen(dloss.float()).masked_fill(ignored, 0.0)
        grads, ctx.grads = ctx.grads, None  # handed over: they are changed below
        dhidden, dweight = grads or (None, None)
        if dhidden is not None:
            dhidden = _scaled(dhidden, scale[:, None], hidden)
        if grads is None or factor is None:  # a second backward pass, or factors differ by token
            dweight = grads = None
            missing = need[0] and dhidden is None, need[1]
            _, scaled, dweight = _run_chunks(hidden, weight, scale, plan, missing)
            dhidden = dhidden if scaled is None else scaled.to(hidden.dtype)
            factor = 1.0
        if dweight is not None:
            dweight = _scaled(dweight, factor, weight)
        return None if dhidden is None else plan.spread(dhidden), dweight, None


def _run_chunks(
    hidden: Tensor, weight: Tensor, scale: Tensor, plan: _Plan, need: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (loss [S], dhidden [S, H] or None, dweight [V, H] or None), all in fp32.

    `scale` [S] is the incoming gradient of the loss.
    """
    ops, tokens = torch.ops.gmai_kernels, len(scale)
    if tokens < len(hidden):
        hidden = plan.chosen(hidden)
    target = plan.chosen(plan.target)
    loss = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    dhidden = torch.empty(hidden.shape, device=hidden.device) if need[0] else None
    dweight: Tensor | None = None
    buffer = _logits_buffer(min(plan.chunk, tokens), weight.shape[0], plan.dtype, hidden.device)
    for start in range(0, tokens, plan.chunk):
        part = slice(start, min(start + plan.chunk, tokens))
        states = hidden[part].to(plan.dtype)  # [C, H]
        logits = _logits(states, weight, buffer[: part.stop - start])  # [C, V]
        stats = ops.cross_entropy_statistics(
            logits, target[part], plan.columns, plan.implementation
        )
        lse, label_logit = combine(stats, plan.all_gather)
        loss[part] = (lse - label_logit).masked_fill_(target[part] == IGNORED, 0.0)
        if not any(need):
            continue
        ops.cross_entropy_gradient_(
            logits, target[part], lse, scale[part], plan.columns, plan.implementation
        )
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
    elif dlogits.device.type != "cpu" or (
        weight.dtype == torch.float32 and len(dlogits) >= CPU_FEW_TOKENS
    ):
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
    if total is not None:
        torch.ops.gmai_kernels.add_product_(total, left, states)
        return total
    if dlogits.dtype == torch.float32:
        return left @ states
    return torch.mm(left, states, out_dtype=torch.float32)


def _scaled(gradient: Tensor, factor: float | Tensor, like: Tensor) -> Tensor:
    """Return factor * gradient in the dtype of `like`: in place if it can be, else in one pass."""
    if gradient.dtype == like.dtype:
        return gradient if isinstance(factor, float) and factor == 1.0 else gradient.mul_(factor)
    out = torch.empty(gradient.shape, dtype=like.dtype, device=like.device)
    return torch.mul(gradient, factor, out=out)


def _common_factor(dloss: Tensor, plan: _Plan) -> float | Tensor | None:
    """Return the value that the gradients of all supervised tokens' losses share, or None.

    An expanded gradient, which a sum or a mean of the loss gives, has one value. On a CPU any other
    is compared; on a GPU that would wait for it, and the answer is None.
    """
    if dloss.stride(0) == 0 or len(dloss) == 1:
        return dloss[0].item() if readable(dloss) else dloss[0]
    if not readable(dloss):
        return None
    scale = dloss[plan.chosen(plan.target) != IGNORED] if plan.rows is None else dloss[plan.rows]
    if len(scale) == 0:
        return 1.0
    low, high = torch.stack(scale.aminmax()).tolist()
    return low if low == high else None
