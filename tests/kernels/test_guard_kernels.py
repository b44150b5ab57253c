"""Every Triton kernel of the project, run once under guard in each of its variants.

Shapes are ragged, rows are strided, and some rows do not count: what tempts a kernel out of bounds.
"""

import pytest
import torch

from gmai_kernels import (
    linear_cross_entropy,
    rms_norm,
    use_implementation,
    vocab_parallel_cross_entropy,
)
from gmai_kernels.testing.guard import guarded

BF16 = torch.bfloat16


def strided(rows: int, columns: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """[rows, columns] with rows that lie 16 elements further apart than they are long."""
    return torch.randn(rows, columns + 16, dtype=dtype)[:, :columns]


def strided_logits(tokens: int, columns: int) -> torch.Tensor:
    """Logits that an op before them has computed, so that the loss may overwrite them."""
    return (torch.randn(tokens, columns + 16, dtype=BF16, requires_grad=True) * 1.0)[:, :columns]


LOSS = ["_statistics_kernel", "_gradient_kernel"]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("hidden", [64, 100, 512, 1000, 5120, 16384, 9000])
def test_rms_norm(hidden, frozen):
    x = strided(11, hidden).requires_grad_()
    weight = torch.randn(hidden, dtype=BF16, requires_grad=not frozen)
    with use_implementation("triton"), guarded() as launched:
        rms_norm(x, weight, 1e-6).backward(strided(11, hidden))
    assert launched[0] == "_forward_kernel" and len(launched) > 1


def test_rms_norm_of_one_row():
    x, weight = torch.randn(1, 300, requires_grad=True), torch.randn(300, requires_grad=True)
    with use_implementation("triton"), guarded() as launched:
        rms_norm(x, weight, 1e-6).sum().backward()
    assert launched[0] == "_forward_kernel" and len(launched) > 1


@pytest.mark.parametrize("ignored", [0, 3, 7])
@pytest.mark.parametrize("columns", [100, 4096, 6000, 9255])
def test_cross_entropy(columns, ignored):
    labels = torch.randint(0, columns, (7,))
    labels[:ignored] = -100
    with use_implementation("triton"), guarded() as launched:
        vocab_parallel_cross_entropy(strided_logits(7, columns), labels).sum().backward()
    assert launched == LOSS


@pytest.mark.parametrize("vocab_start", [0, 5000, 10000])
def test_cross_entropy_of_a_slice_with_padding(vocab_start):
    """A rank of a vocabulary of 9255: all columns true, some, and none."""
    labels = torch.tensor([0, 4999, 5000, 9254, -100])
    with use_implementation("triton"), guarded() as launched:
        loss = vocab_parallel_cross_entropy(
            strided_logits(5, 5000),
            labels,
            vocab_start=vocab_start,
            vocab_size=9255,
            all_gather=lambda stats: torch.stack([stats, stats]),
        )
        loss.sum().backward()
    assert launched == LOSS


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_linear_cross_entropy(frozen):
    hidden = torch.randn(10, 64, dtype=BF16, requires_grad=True)
    weight = torch.randn(2313, 64, dtype=BF16, requires_grad=not frozen)
    labels = torch.randint(0, 2313, (10,))
    with use_implementation("triton"), guarded() as launched:
        linear_cross_entropy(hidden, weight, labels, chunk_size=4).sum().backward()
    assert launched == LOSS * 3
