"""Host memory of `--async-save`: as much as the share, locked on GPUs, written without a copy."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_gmai.runtime.device import Device
from megatron_gmai.training.host_copies import host_copies
from megatron_gmai.training.pieces import Piece

SHAPES = [((3, 70_000), torch.float32), ((5,), torch.bfloat16), ((1, 1, 33), torch.uint8)]
PIECES = [
    Piece(str(number), shape, (0,) * len(shape), torch.full(shape, number + 1, dtype=dtype))
    for number, (shape, dtype) in enumerate(SHAPES)
]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_copies_lie_in_one_locked_range_and_torch_writes_them_as_they_are(kind: str) -> None:
    locked: list[tuple[int, int]] = []

    def lock(pointer: int, size: int, flags: int) -> int:
        locked.append((pointer, size))
        return 0

    device = Device(kind, torch.device("cpu"), "gloo", torch.float32)
    library: Any = SimpleNamespace(cudaHostRegister=lock)
    with (
        mock.patch.object(torch.cuda, "cudart", lambda: library),
        mock.patch.object(torch.cuda, "check_error", lambda error: None),
    ):
        copies = host_copies(PIECES, device)
    for copy, piece in zip(copies, PIECES, strict=True):
        copy.tensor.copy_(piece.tensor)
    for copy, piece in zip(copies, PIECES, strict=True):
        assert torch.equal(copy.tensor, piece.tensor)
        assert copy.tensor.untyped_storage().size() == copy.tensor.nbytes  # else torch copies it
        for begin, size in locked:
            assert begin <= copy.tensor.data_ptr() <= begin + size - copy.tensor.nbytes
    assert len(locked) == (kind == "cuda")
    assert all(size < 1.01 * sum(p.tensor.nbytes for p in PIECES) for _, size in locked)


def test_a_rank_that_writes_nothing_needs_no_memory() -> None:
    assert host_copies([], Device("cpu", torch.device("cpu"), "gloo", torch.float32)) == []
