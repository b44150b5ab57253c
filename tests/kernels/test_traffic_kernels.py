"""The project's ops move no more bytes than their bars allow, counted on a GPU's code path.

Bars are bytes per bfloat16 element to one decimal, which leaves per-row numbers (labels,
statistics) out.
"""

from dataclasses import dataclass

import pytest
import torch

from gmai_kernels import (
    cross_entropy_triton,
    linear_cross_entropy,
    rms_norm_triton,
    use_implementation,
)
from gmai_kernels.linear_cross_entropy import GPU_CHUNK
from gmai_kernels.testing.disguise import looks_like_gpu
from gmai_kernels.testing.traffic import counted

BF16 = torch.bfloat16
EPS = 1e-6


def norm_inputs(rows: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, r, weight."""
    weight = torch.randn(hidden, dtype=BF16)
    return torch.randn(rows, hidden, dtype=BF16), torch.rand(rows, 1), weight


@pytest.mark.parametrize("hidden", [64, 1000, 16384])
def test_rms_norm_forward(hidden):
    """Reads x, writes y; the weight, 2 bytes, comes from the cache."""
    x, _, weight = norm_inputs(8, hidden)
    with counted() as traffic:
        rms_norm_triton.forward(x, weight, EPS)
    assert traffic.total == x.numel() * 6 + 8 * 4  # r is stored for the backward pass


def test_rms_norm_backward():
    """Reads x and dy, writes dx; the weight and its gradient's shares are once per program."""
    x, r, weight = norm_inputs(1024, 128)
    with counted() as traffic:
        rms_norm_triton.backward(x, x, r, weight, True)
    assert round(traffic.total / x.numel(), 1) <= 6.1


def test_each_further_row_of_a_wide_backward():
    """As for narrow rows, and the weight comes from the cache again: registers are short."""
    moved = []
    for rows in (16, 32):
        x, r, weight = norm_inputs(rows, 8200)
        with counted() as traffic:
            rms_norm_triton.backward(x, x, r, weight, True)
        moved.append(traffic.total)
    assert (moved[1] - moved[0]) / (16 * 8200) <= 8.0 + 4 / 8200  # r


def test_rms_norm_backward_of_a_frozen_weight_moves_no_shares():
    x, r, weight = norm_inputs(800, 128)
    with counted() as traffic:
        rms_norm_triton.backward(x, x, r, weight, False)
    # r once a row, and 8 programs load the weight once
    assert traffic.total == x.numel() * 6 + 800 * 4 + 8 * 128 * 2


@pytest.mark.parametrize("columns", [32000, 92553 // 2])
def test_vocabulary_parallel_cross_entropy(columns):
    """Statistics read the logits; the gradient reads and overwrites them."""
    logits = torch.randn(4, columns, dtype=BF16)
    target = torch.tensor([0, 5, columns - 1, -1])
    with counted() as traffic:
        stats = cross_entropy_triton.statistics(logits, target, columns)
        lse, scale = stats[:, 0] + stats[:, 1].log(), torch.ones(4)
        cross_entropy_triton.gradient_(logits, target, lse, scale, columns)
    assert round(traffic.total / logits.numel(), 1) <= 6.0


def test_rows_without_a_label_are_not_read():
    logits = torch.randn(4, 32000, dtype=BF16)
    target = torch.full((4,), -2)
    with counted() as traffic:
        cross_entropy_triton.statistics(logits, target, 32000)
        cross_entropy_triton.gradient_(logits, target, torch.zeros(4), torch.zeros(4), 32000)
    assert round(traffic.total / logits.numel(), 1) == 2.0  # zeros are written


@dataclass(frozen=True)
class Shape:
    """One call of linear cross-entropy: tokens, hidden size, vocabulary, tokens of a chunk."""

    tokens: int
    hidden: int
    vocabulary: int
    chunk: int


def count(shape: Shape, frozen: bool) -> int:
    """Bytes that a training step of the op moves, in kernels and torch operations."""
    hidden = torch.randn(shape.tokens, shape.hidden, dtype=BF16, requires_grad=True)
    weight = torch.randn(shape.vocabulary, shape.hidden, dtype=BF16, requires_grad=not frozen)
    labels = torch.randint(0, shape.vocabulary, (shape.tokens,))
    with use_implementation("triton"), looks_like_gpu(), counted() as traffic:
        loss = linear_cross_entropy(hidden, weight, labels, chunk_size=shape.chunk)
        loss.sum().backward()
    return traffic.total


def formula(shape: Shape, frozen: bool) -> int:
    """The same, by reasoning; numbers per token and single numbers left out.

    Each chunk reads the weight and writes its logits, reads them for the statistics, reads and
    overwrites them for the gradient, and reads both to give the hidden gradient in float32, which
    the backward pass scales and converts. A trained weight adds one read of the logits and of the
    hidden states, and its gradient in float32: written by the first chunk, read and written by each
    later one, and at the end read once more to be scaled and converted.
    """
    chunks = shape.tokens // shape.chunk
    logits = 2 * shape.tokens * shape.vocabulary
    hidden = 2 * shape.tokens * shape.hidden
    weight = 2 * shape.vocabulary * shape.hidden
    moved = chunks * 2 * weight + 5 * logits + hidden + 2 * 2 * hidden + hidden
    if not frozen:
        accumulated = 2 * weight
        moved += logits + hidden + (2 * chunks - 1) * accumulated + accumulated + weight
    return moved


SCALES = [Shape(64, 128, 6000, 32), Shape(128, 256, 12000, 32)]
FULL = Shape(4096, 2048, 92544, GPU_CHUNK)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("shape", SCALES, ids=["small", "larger"])
def test_the_formula_for_linear_cross_entropy_holds_at_two_scales(shape, frozen):
    assert count(shape, frozen) == pytest.approx(formula(shape, frozen), rel=0.01)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_linear_cross_entropy_at_full_size(frozen):
    assert formula(FULL, frozen) <= 12e9
