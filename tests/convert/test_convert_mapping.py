"""The name table is complete, and its rules can be undone."""

import pytest
import torch

from megatron_gmai.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_gmai.convert.mapping import (
    Flavour,
    leftover_shapes,
    qkv_rule,
    rows,
)
from megatron_gmai.convert.memory import ReusedMemory
from megatron_gmai.weights import weights

FLAVOURS: tuple[Flavour, ...] = ("transformers", "original")
# (vision layers, vision hidden, vision heads, layers, hidden, heads, groups, ffn, vocabulary)
SIZES = (
    (2, 8, 1, 1, 12, 1, 1, 5, 7),
    (3, 16, 4, 2, 24, 6, 2, 40, 33),
    (5, 24, 2, 3, 32, 8, 8, 44, 101),
    (4, 24, 3, 1, 60, 6, 1, 17, 65),
)


def model_of(sizes: tuple[int, ...]) -> ModelConfig:
    vision_layers, vision_hidden, vision_heads, layers, hidden, heads, groups, ffn, words = sizes
    return ModelConfig(
        VisionConfig(vision_layers, vision_hidden, vision_heads, 2 * vision_hidden + 1, 7, 14),
        LanguageConfig(layers, hidden, heads, groups, ffn, words),
        image_token_id=words - 1,
    )


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_tensor_has_exactly_one_place_on_either_side(
    sizes: tuple[int, ...], flavour: Flavour
) -> None:
    model = model_of(sizes)
    table = rows(model, flavour)
    names = [row.canonical for row in table]
    sources = [source for row in table for source in row.sources]
    assert len(set(names)) == len(names)
    assert len(set(sources)) == len(sources)
    assert not set(sources) & set(leftover_shapes(model))
    assert set(names) == set(weights(model))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("sizes", SIZES)
def test_split_and_merge_undo_each_other(sizes: tuple[int, ...], flavour: Flavour) -> None:
    for row in rows(model_of(sizes), flavour):
        tensor = torch.randn(row.shape)
        parts = row.rule.split(tensor)
        assert tuple(tuple(part.shape) for part in parts) == row.source_shapes, row.canonical
        assert torch.equal(row.rule.merge(parts, ReusedMemory()), tensor), row.canonical
        sources = [torch.randn(shape) for shape in row.source_shapes]
        again = row.rule.split(row.rule.merge(sources, ReusedMemory()))
        assert all(torch.equal(a, b) for a, b in zip(sources, again, strict=True)), row.canonical


def test_qkv_rows_stand_group_by_group() -> None:
    # 2 groups of 2 queries, heads of one row: values name the row.
    query = torch.tensor([[10.0], [11.0], [20.0], [21.0]])
    key = torch.tensor([[12.0], [22.0]])
    value = torch.tensor([[13.0], [23.0]])
    merged = qkv_rule(groups=2, queries_per_group=2).merge([query, key, value], ReusedMemory())
    assert merged.flatten().tolist() == [10, 11, 12, 13, 20, 21, 22, 23]


def test_the_last_vision_layer_is_left_over() -> None:
    model = model_of(SIZES[1])
    assert not any("vision_model.decoder.layers.2." in name for name in weights(model))
    left = leftover_shapes(model)
    assert left["vision_tower.vision_model.post_layernorm.weight"] == (16,)
    assert left["vision_tower.vision_model.encoder.layers.2.self_attn.q_proj.weight"] == (16, 16)


def test_an_unknown_flavour_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown checkpoint flavour 'gguf'"):
        rows(model_of(SIZES[0]), "gguf")  # type: ignore[arg-type]
