"""Copies of a checkpoint's boxes: each is written once, and no rank has much more than another."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_gmai.training.pieces import Piece, pieces_of_run
from megatron_gmai.training.shares import Held, own_share
from megatron_gmai.weights import Weight, local_shape

WEIGHTS = [
    Weight("vision_model.a", (7, 5)),
    Weight("projector.b", (64, 3)),
    Weight("language_model.words", (130, 3), "vocabulary", "first"),  # a rank has padding only
    *(
        weight
        for n in range(6)
        for weight in (
            Weight(f"language_model.norm{n}", (9,), place="layer"),
            Weight(f"language_model.fc1{n}", (16, 4), "gate_up", "layer"),
            Weight(f"language_model.fc2{n}", (5 + n, 8), "columns", "layer"),
        )
    ),
]


def group(size: int, rank: int) -> Any:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


def held(tp: int, tp_rank: int, is_sharded: bool) -> list[Held]:
    """What a rank holds of all weights; the state of a sharded optimizer begins with its name."""
    found = []
    for weight in WEIGHTS:
        local = local_shape(weight, tp)
        run = torch.zeros(local).view(-1)
        for piece in pieces_of_run(weight.name, weight, local, tp_rank, run, 0):
            found.append(Held.of(piece, weight))
        for piece in pieces_of_run(f"state.{weight.name}", weight, local, tp_rank, run, 0):
            found.append(Held.of(piece, weight, along_dp=not is_sharded))
    return found


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (1, 4), (2, 3), (4, 2)])
def test_every_box_is_written_once_and_shares_are_even(tp: int, dp: int) -> None:
    written: Counter[tuple[str, tuple[int, ...]]] = Counter()
    sizes: dict[int, list[int]] = {rank: [] for rank in range(tp)}
    for t in range(tp):
        mine = held(tp, t, is_sharded=False)
        largest = max(one.piece.tensor.nbytes for one in mine)
        for d in range(dp):
            groups: Any = SimpleNamespace(tp=group(tp, t), dp_cp=group(dp, d), pp=group(1, 0))
            share = own_share(mine, groups)
            written.update((piece.name, piece.offsets) for piece in share)
            sizes[t].append(sum(piece.tensor.nbytes for piece in share))
        assert max(sizes[t]) - min(sizes[t]) <= largest
    everything = {(o.piece.name, o.piece.offsets) for t in range(tp) for o in held(tp, t, False)}
    assert written == Counter(dict.fromkeys(everything, 1))


def test_state_that_only_tp_ranks_share_is_written_by_one_of_them() -> None:
    written: Counter[tuple[str, tuple[int, ...], int]] = Counter()
    for t in range(2):
        for d in range(2):
            groups: Any = SimpleNamespace(tp=group(2, t), dp_cp=group(2, d), pp=group(1, 0))
            for piece in own_share(held(2, t, is_sharded=True), groups):
                column = d if piece.name.startswith("state.") else -1
                written[piece.name, piece.offsets, column] += 1
    assert set(written.values()) == {1}


def test_a_later_stage_leaves_what_the_first_one_has_to_it() -> None:
    groups: Any = SimpleNamespace(tp=group(1, 0), dp_cp=group(1, 0), pp=group(2, 1))
    piece = Piece("x", (2,), (0,), torch.zeros(2))
    assert own_share([Held(piece, along_pp=True), Held(piece)], groups) == [piece]
