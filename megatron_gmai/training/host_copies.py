"""Host memory for `--async-save`: the pieces of a checkpoint, copied while training waits."""

import mmap
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from megatron_gmai.runtime.device import Device
from megatron_gmai.training.pieces import Piece

_ALIGNED = 512  # bytes


def host_copies(pieces: Sequence[Piece], device: Device) -> list[Piece]:
    """The pieces with memory of their own, touched and not yet filled: for the first time that is
    most of the cost of a copy.

    A GPU writes straight into memory that is locked, several times as fast. It is locked here, all
    of it at once, since torch's own locked memory is a power of two for each tensor: up to twice
    as much. Each piece has a storage of its own, which is what torch writes without a copy.
    """
    sizes = [-(-piece.tensor.nbytes // _ALIGNED) * _ALIGNED for piece in pieces]
    if not sizes:
        return []
    # It lives as long as the tensors in it. A child process would have locked pages copied.
    memory = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    whole = torch.frombuffer(memory, dtype=torch.uint8).zero_()
    if device.is_cuda:
        error = torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.nbytes, 0)
        torch.cuda.check_error(int(error))
    copies = []
    for piece, begin in zip(pieces, accumulate(sizes, initial=0), strict=False):
        tensor = piece.tensor
        copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=begin)
        copies.append(replace(piece, tensor=copy.view(tensor.shape)))
    return copies
