"""Which ranks drop the same inputs of an adapter."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from megatron_gmai.runtime.groups import OF_RANK, OF_TOKENS, seed_everything
from tests.parallel.batches import CONFIG
from tests.parallel.cases import Processes


def group(rank: int, size: int = 2) -> SimpleNamespace:
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


def masks(name: str, **ranks: int) -> Tensor:
    """Two masks in turn, [2, 64], of a rank of a world of two in every direction."""
    groups: Any = SimpleNamespace(
        **{each: group(ranks.get(each, 0)) for each in ("tp", "pp", "dp_cp")}
    )
    seed_everything(7, groups)
    drawn = []
    for _ in range(2):
        with get_cuda_rng_tracker().fork(name):
            drawn.append(torch.nn.functional.dropout(torch.ones(64), 0.5))
    return torch.stack(drawn)


@pytest.mark.parametrize("name", [OF_TOKENS, OF_RANK])
def test_masks_differ_between_tokens_and_replicas_and_come_again(
    name: str, alone: Processes
) -> None:
    alone.world(CONFIG)
    first = masks(name)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, masks(name))
    for direction in ("pp", "dp_cp"):
        assert not torch.equal(first, masks(name, **{direction: 1})), direction


def test_only_where_the_input_is_whole_tensor_parallel_ranks_share_a_mask(alone: Processes) -> None:
    alone.world(CONFIG)
    assert torch.equal(masks(OF_TOKENS), masks(OF_TOKENS, tp=1))
    assert not torch.equal(masks(OF_RANK), masks(OF_RANK, tp=1))
