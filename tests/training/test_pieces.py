"""Boxes of whole tensors: every element of every rank's part has exactly one place."""

import math
import random

import pytest
import torch

from megatron_gmai.convert.sharding import shard
from megatron_gmai.training.pieces import boxes, pieces_of_run
from megatron_gmai.weights import Cut, Weight, local_shape

SHAPES = [(7,), (5, 3), (4, 3, 2), (1, 1, 6), (3, 2, 2, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_cover_a_run_once_in_memory_order(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    numbers = torch.arange(size).view(shape)
    for begin in range(size + 1):
        for end in range(begin, size + 1):
            found = list(boxes(shape, begin, end))
            assert len(found) <= 2 * len(shape) - 1
            taken = [
                numbers[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
                for offsets, sizes in found
            ]
            flat = torch.cat([t.flatten() for t in taken]) if taken else torch.empty(0)
            assert flat.tolist() == list(range(begin, end))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("cut", "shape"),
    [
        ("none", (6,)),
        ("none", (2, 3, 2, 2)),
        ("rows", (8, 5)),
        ("columns", (3, 8)),
        ("gate_up", (16, 3)),
        ("vocabulary", (130, 3)),  # padded to 128 rows a rank: some ranks hold padding only
    ],
)
def test_runs_of_all_ranks_put_together_are_the_whole(
    cut: Cut, shape: tuple[int, ...], tp_size: int
) -> None:
    """As a sharded optimizer holds them: each part cut at random places between ranks."""
    weight = Weight("language_model.any.weight", shape, cut)
    whole = torch.arange(1, math.prod(shape) + 1).view(shape)
    found, times = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    draw = random.Random(0)
    for tp_rank in range(tp_size):
        local = local_shape(weight, tp_size)
        part = shard(weight, whole, tp_rank, tp_size).reshape(-1)
        bounds = sorted([0, part.numel(), *(draw.randrange(part.numel()) for _ in range(3))])
        for begin, end in zip(bounds, bounds[1:], strict=False):
            run = part[begin:end]
            for piece in pieces_of_run("x", weight, local, tp_rank, run, begin):
                assert piece.shape == shape
                box = tuple(
                    slice(o, o + n) for o, n in zip(piece.offsets, piece.tensor.shape, strict=True)
                )
                found[box] += piece.tensor
                times[box] += 1 if tp_rank == 0 or cut != "none" else 0
    assert torch.equal(found, whole * (tp_size if cut == "none" else 1))
    assert torch.equal(times, torch.ones_like(times))
