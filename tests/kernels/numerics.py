"""What the numeric tests share: implementations, tolerances, and one process as many ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from gmai_kernels import use_implementation
from gmai_kernels.testing.interpreter import interpret

# Largest error divided by the largest value of the float64 reference.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}

every_implementation = pytest.mark.parametrize("implementation", ("torch", "triton"))
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=("fp32", "bf16"))


@contextmanager
def running(implementation: str) -> Iterator[None]:
    """Run the ops of the block with one implementation; Triton runs in the interpreter."""
    with use_implementation(implementation), interpret():
        yield


def leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of `tensor` that collects its own gradient."""
    return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()


def grad(tensor: Tensor) -> Tensor:
    """The gradient that a leaf has collected; fails where there is none."""
    assert tensor.grad is not None
    return tensor.grad


def assert_close(found: Tensor, reference: Tensor, tolerance: float, name: str) -> None:
    """Fail unless the largest error is within `tolerance` of the reference's largest value."""
    assert found.shape == reference.shape, name
    scale = reference.double().abs().max().item()
    error = (found.double() - reference.double()).abs().max().item()
    assert error <= tolerance * scale, f"{name}: error {error:.3g} at values up to {scale:.3g}"


def as_ranks(ranks: int, run: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """Call `run(rank, all_gather)` for each of `ranks` ranks in this one process.

    A first round records what each rank sends; its results are dropped, so `run` must make fresh
    inputs. In the second round every all_gather call returns what all ranks sent in the call of
    that number.
    """
    sent: list[list[Tensor]] = [[] for _ in range(ranks)]
    for rank in range(ranks):

        def record(own: Tensor, rank: int = rank) -> Tensor:
            sent[rank].append(own.clone())
            return own[None]

        run(rank, record)
    results = []
    for rank in range(ranks):
        calls = iter(list(zip(*sent, strict=True)))

        def replay(_: Tensor, calls: Iterator[tuple[Tensor, ...]] = calls) -> Tensor:
            return torch.stack(next(calls))

        results.append(run(rank, replay))
    return results
