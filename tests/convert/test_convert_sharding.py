"""Tensor-parallel slices put together again give the whole tensor."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_gmai.config import ModelConfig
from megatron_gmai.convert.mapping import canonical_shapes
from megatron_gmai.convert.sharding import cut_of, shard, unshard

LAYER = "language_model.decoder.layers.0"


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_unshard_undoes_shard(
    model_config: ModelConfig,
    random_weights: Callable[[ModelConfig], dict[str, Tensor]],
    tp_size: int,
) -> None:
    padded = 128 * tp_size
    for name, tensor in random_weights(model_config).items():
        parts = [shard(name, tensor, rank, tp_size, padded) for rank in range(tp_size)]
        assert torch.equal(unshard(name, parts, model_config.language.vocab_size), tensor), name


def test_every_weight_has_a_cut(model_config: ModelConfig) -> None:
    cuts = {name: cut_of(name) for name in canonical_shapes(model_config)}
    assert {cut for name, cut in cuts.items() if not name.startswith("language_model.")} == {"none"}
    assert {cut for name, cut in cuts.items() if name.startswith("language_model.")} == {
        "none", "vocabulary", "rows", "columns", "gate_up"
    }  # fmt: skip


def test_fc1_keeps_gate_and_up_of_the_same_rank_together() -> None:
    fc1 = torch.arange(8.0).view(8, 1)  # gate 0-3, up 4-7
    part = shard(f"{LAYER}.mlp.linear_fc1.weight", fc1, tp_rank=1, tp_size=2, padded_vocab=128)
    assert part.flatten().tolist() == [2, 3, 6, 7]


def test_the_vocabulary_is_padded_with_zeros_before_it_is_cut() -> None:
    name = "language_model.output_layer.weight"
    parts = [shard(name, torch.ones(5, 3), rank, 2, padded_vocab=8) for rank in range(2)]
    assert [part.shape for part in parts] == [(4, 3), (4, 3)]
    assert parts[0].sum() == 12 and parts[1].sum() == 3


@pytest.mark.parametrize(
    ("name", "shape", "rank", "size", "padded", "message"),
    [
        ("language_model.wat", (4, 4), 0, 2, 8, "not a canonical weight name"),
        (f"{LAYER}.self_attention.linear_qkv.weight", (6, 4), 0, 4, 8, "does not divide by 4"),
        (f"{LAYER}.mlp.linear_fc1.weight", (6, 4), 0, 2, 8, "does not divide by 2"),
        ("language_model.output_layer.weight", (9, 4), 0, 2, 8, "more than the padded vocabulary"),
        (f"{LAYER}.mlp.linear_fc2.weight", (4, 4), 2, 2, 8, "rank 2 is outside a group of 2"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    name: str, shape: tuple[int, int], rank: int, size: int, padded: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shard(name, torch.zeros(shape), rank, size, padded)
