"""What a rank holds of the tensors that a checkpoint stores: boxes of whole tensors.

A checkpoint knows no layout: each of its tensors is whole, in the shape of `megatron_gmai.weights`,
and every rank says which box of it its memory is. A tensor-parallel part is one box (of fused gate
and up rows: two). A sharded optimizer cuts its buffers wherever the ranks' shares end, in the
middle of a row too; a run of a flattened tensor is at most `2 · dimensions - 1` boxes.

(Megatron's own "fully reshardable" form gathers the whole state on every rank, and writes zeros for
parameters that cross the padding between two of several buckets: megatron-core 0.16.1.)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron_gmai.weights import Shape, Weight


@dataclass(frozen=True)
class Piece:
    """A box of the tensor `name`, whose memory is `tensor`: to write from or to read into."""

    name: str
    shape: Shape  # of the whole tensor
    offsets: tuple[int, ...]  # of the box
    tensor: Tensor


@dataclass(frozen=True)
class Slab:
    """Rows `begin` up to `begin + rows` of a rank's part, and their place in the whole tensor."""

    begin: int
    rows: int
    offsets: tuple[int, ...]


def slabs(weight: Weight, local: Shape, tp_rank: int) -> list[Slab]:
    """How a rank's part, of shape `local`, lies in the whole weight: runs of its rows.

    Padding rows of the vocabulary lie nowhere, so a checkpoint does not depend on them.
    """
    rows, zeros = local[0], (0,) * (len(local) - 1)
    if weight.cut == "columns":
        return [Slab(0, rows, (0, tp_rank * local[1], *zeros[1:]))]
    if weight.cut == "gate_up":
        half, up = rows // 2, weight.shape[0] // 2
        return [
            Slab(0, half, (tp_rank * half, *zeros)),
            Slab(half, half, (up + tp_rank * half, *zeros)),
        ]
    first = tp_rank * rows if weight.cut in ("rows", "vocabulary") else 0
    real = min(rows, max(0, weight.shape[0] - first))
    return [Slab(0, real, (first, *zeros))] if real else []


def pieces_of_run(
    name: str, weight: Weight, local: Shape, tp_rank: int, run: Tensor, begin: int
) -> Iterator[Piece]:
    """Boxes of a run of a part's elements, row by row: [n] beginning at element `begin`.

    The whole part is the run that begins at 0 with all of its elements.
    """
    row = math.prod(local[1:])
    end = begin + run.numel()
    for slab in slabs(weight, local, tp_rank):
        first, last = max(begin, slab.begin * row), min(end, (slab.begin + slab.rows) * row)
        start = first
        for offsets, sizes in boxes(local, first, last):
            stop = start + math.prod(sizes)
            from_slab = (offsets[0] - slab.begin, *offsets[1:])
            yield Piece(
                name,
                weight.shape,
                tuple(a + b for a, b in zip(slab.offsets, from_slab, strict=True)),
                run[start - begin : stop - begin].view(sizes),
            )
            start = stop


def boxes(shape: Shape, begin: int, end: int) -> Iterator[tuple[tuple[int, ...], Shape]]:
    """Offsets and sizes of boxes that cover elements begin to end of a tensor, in memory order."""
    if begin >= end:
        return
    if len(shape) == 1:
        yield (begin,), (end - begin,)
        return
    row = math.prod(shape[1:])
    index, inside = divmod(begin, row)
    if inside or end - begin < row:  # a part of one row
        stop = min(end, (index + 1) * row)
        for offsets, sizes in boxes(shape[1:], inside, stop - index * row):
            yield (index, *offsets), (1, *sizes)
        yield from boxes(shape, stop, end)
        return
    count = (end - begin) // row
    yield (index, *(0,) * (len(shape) - 1)), (count, *shape[1:])
    yield from boxes(shape, begin + count * row, end)
