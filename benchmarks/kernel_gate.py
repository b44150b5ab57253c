"""Gate part of the kernel benchmark: what compiler and traffic counter say, beside Liger-Kernel.

Both sides go through the same tools in the same run: their own launchers, compiled for GPUs that
need not be there, and run in the interpreter with every byte counted. Liger-Kernel is measured
where it is installed (`pip install --no-deps liger-kernel==0.8.5`); nothing else needs it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from kernel_figures import Figure, at_most
from torch import Tensor

from gmai_kernels import (
    linear_cross_entropy,
    rms_norm,
    use_implementation,
    vocab_parallel_cross_entropy,
)
from gmai_kernels.linear_cross_entropy import GPU_CHUNK
from gmai_kernels.testing.disguise import looks_like_gpu
from gmai_kernels.testing.gate import SM_80, SM_90, SM_100, compiling
from gmai_kernels.testing.traffic import counted

BF16 = torch.bfloat16
EPS = 1e-5
HIDDEN_SIZES = (4096, 8192, 16384)
VOCABULARIES = (92544, 92553)
COMPILED_ROWS = 16
# Shapes of the traffic count, which does not depend on the width.
NORM_ROWS, NORM_HIDDEN = 1024, 128
LOSS_ROWS, LOSS_COLUMNS = 4, 46272
# The linear loss is counted at 1/16 and 1/32 of this shape; each of its terms is a product of two
# of the three lengths, so it grows with the square of the scale.
TOKENS, HIDDEN, VOCABULARY = 4096, 2048, 92544
SCALES = (16, 32)


@dataclass(frozen=True)
class Library:
    """The ops of one library: inputs in, value out, gradients by autograd."""

    name: str
    norm: Callable[[Tensor, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]  # over a vocabulary that several ranks share
    linear_loss: Callable[[Tensor, Tensor, Tensor, int], Tensor]  # summed; at 1/scale of the size

    def figure(self, name: str, value: float, unit: str, bar: float) -> Figure:
        """A figure that has to hold its bar if it is this project's."""
        name = f"{name}, {self.name}"
        return at_most(name, value, unit, bar) if self.name == "ours" else Figure(name, value, unit)


def figures() -> tuple[list[Figure], list[str]]:
    """Return the figures of both libraries, and notes on what was left out."""
    libraries, notes = [_ours()], []
    if importlib.util.find_spec("liger_kernel"):
        libraries.append(_liger())
    else:
        notes.append("gate: Liger-Kernel is not installed, so only this project is measured")
    found = [figure for library in libraries for figure in _traffic(library)]
    return found + [figure for library in libraries for figure in _compiled(library)], notes


def _ours() -> Library:
    return Library(
        "ours",
        lambda x, weight: rms_norm(x, weight, EPS),
        lambda logits, labels: vocab_parallel_cross_entropy(
            logits,
            labels,
            vocab_size=2 * logits.shape[1],
            all_gather=lambda stats: torch.stack((stats, stats)),
        ),
        lambda hidden, weight, labels, scale: linear_cross_entropy(
            hidden, weight, labels, chunk_size=GPU_CHUNK // scale
        ).sum(),
    )


def _liger() -> Library:
    from liger_kernel.ops import fused_linear_cross_entropy as linear
    from liger_kernel.ops import rms_norm as norm
    from liger_kernel.ops import vocab_parallel_cross_entropy as loss

    return Library(
        "Liger",
        lambda x, weight: norm.LigerRMSNormFunction.apply(x, weight, EPS),
        lambda logits, labels: loss.LigerVocabParallelCEFunction.apply(
            logits[None], labels[None], None, -100, 0.0, "megatron", "global"
        )[0],
        lambda hidden, weight, labels, _: linear.LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum"
        )[0],
    )


def _traffic(library: Library) -> list[Figure]:
    """Bytes moved in bf16: an element for RMSNorm and the loss, in all for the linear loss."""
    x, weight = _leaf(NORM_ROWS, NORM_HIDDEN), _leaf(NORM_HIDDEN)
    logits, labels = _leaf(LOSS_ROWS, LOSS_COLUMNS), torch.arange(LOSS_ROWS)
    dloss = torch.ones(LOSS_ROWS)
    with use_implementation("triton"), counted() as forward:
        y = library.norm(x, weight)
    with counted() as backward:
        y.backward(x.detach())
    with use_implementation("triton"), counted() as both:
        torch.autograd.grad(library.loss(logits, labels), logits, dloss)
    found = [
        ("RMSNorm forward", forward.total / x.numel(), 6.0),
        ("RMSNorm backward", backward.total / x.numel(), 6.1),
        ("vocabulary-parallel cross-entropy", both.total / logits.numel(), 6.0),
    ]
    figures = [
        library.figure(f"traffic, {name}", round(value, 1), "B/element", bar)
        for name, value, bar in found
    ]
    for scale in SCALES:
        gigabytes = _linear_loss_bytes(library, scale) * scale**2 / 1e9
        name = f"traffic, linear cross-entropy, counted at 1/{scale}"
        figures.append(library.figure(name, gigabytes, "GB", 12.0))
    return figures


def _linear_loss_bytes(library: Library, scale: int) -> int:
    tokens, hidden, vocabulary = (n // scale for n in (TOKENS, HIDDEN, VOCABULARY))
    states, weight = _leaf(tokens, hidden), _leaf(vocabulary, hidden)
    labels = torch.arange(tokens)
    with use_implementation("triton"), looks_like_gpu(), counted() as traffic:
        library.linear_loss(states, weight, labels, scale).backward()
    return traffic.total


def _compiled(library: Library) -> list[Figure]:
    """Registers and spills of every kernel in a training step of RMSNorm and of the loss."""
    found = []
    for target in (SM_80, SM_90, SM_100):
        for size in HIDDEN_SIZES + VOCABULARIES:
            with use_implementation("triton"), compiling(target) as kernels:
                if size in HIDDEN_SIZES:
                    x = _leaf(COMPILED_ROWS, size)
                    library.norm(x, _leaf(size)).backward(x.detach())
                else:
                    logits = torch.empty(COMPILED_ROWS, -(-size // 16) * 16, dtype=BF16)
                    labels = torch.zeros(COMPILED_ROWS, dtype=torch.int64)
                    loss = library.loss(logits[:, :size].requires_grad_(), labels)
                    loss.backward(torch.ones(COMPILED_ROWS))
            for kernel in kernels:
                name = f"{target.name}, {kernel.kernel.strip('_')}, {size}"
                found.append(
                    Figure(f"registers, {name}, {library.name}", kernel.registers, "a thread")
                )
                found.append(library.figure(f"spills, {name}", kernel.spills, "B/thread", 0))
    return found


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=BF16).requires_grad_()
