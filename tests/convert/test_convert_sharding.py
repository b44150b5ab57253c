"""Tensor-parallel slices put together again give the whole tensor."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_gmai.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_gmai.convert.mapping import Flavour, rows
from megatron_gmai.convert.memory import ReusedMemory
from megatron_gmai.convert.sharding import shard, unshard
from megatron_gmai.weights import Cut, Weight, local_shape, weights


def weight(shape: tuple[int, ...], cut: Cut) -> Weight:
    return Weight("language_model.any.weight", shape, cut)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_unshard_undoes_shard(
    model_config: ModelConfig,
    random_weights: Callable[[ModelConfig], dict[str, Tensor]],
    tp_size: int,
) -> None:
    table = weights(model_config)
    for name, tensor in random_weights(model_config).items():
        parts = [shard(table[name], tensor, rank, tp_size) for rank in range(tp_size)]
        assert {tuple(part.shape) for part in parts} == {local_shape(table[name], tp_size)}, name
        assert torch.equal(unshard(table[name], parts), tensor), name


def drawn_model(seed: int) -> tuple[ModelConfig, int]:
    """A model of random sizes, and a tensor-parallel size that divides them."""
    draw = random.Random(seed)
    tp = draw.choice([1, 2, 4])
    groups = tp * draw.randint(1, 3)
    heads, head = groups * draw.randint(1, 4), 2 * draw.randint(1, 4)
    vision_heads = draw.randint(1, 3)
    vision = VisionConfig(
        num_layers=draw.randint(2, 5),
        hidden_size=vision_heads * draw.randint(1, 5),
        num_attention_heads=vision_heads,
        ffn_hidden_size=draw.randint(1, 20),
        patch_size=7,
        image_size=14,
    )
    words = draw.randint(5, 700)
    language = LanguageConfig(
        draw.randint(1, 3), heads * head, heads, groups, tp * draw.randint(1, 9), words
    )
    return ModelConfig(vision, language, image_token_id=words - 1), tp


@pytest.mark.parametrize("flavour", ["transformers", "original"])
@pytest.mark.parametrize("seed", range(12))
def test_published_tensors_of_any_size_come_back_from_their_parts(
    seed: int, flavour: Flavour
) -> None:
    model, tp = drawn_model(seed)
    for row in rows(model, flavour):
        sources = [torch.randn(shape) for shape in row.source_shapes]
        whole = row.rule.merge(sources, ReusedMemory())
        parts = [shard(row.weight, whole, rank, tp) for rank in range(tp)]
        again = row.rule.split(unshard(row.weight, parts))
        assert all(map(torch.equal, again, sources)), row.canonical


def test_only_the_language_model_is_cut(model_config: ModelConfig) -> None:
    table = weights(model_config).values()
    assert {w.cut for w in table if w.tower != "language_model"} == {"none"}
    assert {w.cut for w in table if w.tower == "language_model"} == {
        "none", "vocabulary", "rows", "columns", "gate_up"
    }  # fmt: skip


def test_fc1_keeps_gate_and_up_of_the_same_rank_together() -> None:
    fc1 = torch.arange(8.0).view(8, 1)  # gate 0-3, up 4-7
    part = shard(weight((8, 1), "gate_up"), fc1, tp_rank=1, tp_size=2)
    assert part.flatten().tolist() == [2, 3, 6, 7]


def test_the_vocabulary_is_padded_with_zeros_before_it_is_cut() -> None:
    output = weight((130, 3), "vocabulary")
    parts = [shard(output, torch.ones(130, 3), rank, 2) for rank in range(2)]
    assert [part.shape for part in parts] == [(128, 3), (128, 3)]
    assert parts[0].sum() == 3 * 128 and parts[1].sum() == 3 * 2


@pytest.mark.parametrize(
    ("cut", "shape", "rank", "size", "message"),
    [
        ("rows", (6, 4), 0, 4, "does not divide by 4"),
        ("gate_up", (6, 4), 0, 2, "does not divide by 2"),
        ("vocabulary", (900, 4), 0, 2, "more than the padded vocabulary"),
        ("columns", (4, 4), 2, 2, "rank 2 is outside a group of 2"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    cut: Cut, shape: tuple[int, int], rank: int, size: int, message: str
) -> None:
    stated = weight((9, 4) if cut == "vocabulary" else shape, cut)
    with pytest.raises(ValueError, match=message):
        shard(stated, torch.zeros(shape), rank, size)
