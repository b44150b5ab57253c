"""How images enter the sequence, what trains, and what can never be predicted."""

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.fusions.fused_bias_swiglu import swiglu
from torch import Tensor

from megatron_gmai.config import TrainConfig
from megatron_gmai.model.gmai_vl import GMAIVL, build_chunks
from megatron_gmai.training.optimizer import wrap_for_training
from megatron_gmai.training.weights import weight_pieces
from megatron_gmai.weights import padded_vocab_size
from tests.parallel.batches import CONFIG, LENGTH, MODEL, losses_of, make_pack
from tests.parallel.cases import PHASES, Processes

PARTS = {"vision_model", "projector", "language_model"}


@pytest.fixture
def model(alone: Processes) -> GMAIVL:
    return build(alone, {})


def build(world: Processes, frozen: dict[str, Any]) -> GMAIVL:
    config = dataclasses.replace(CONFIG, train=TrainConfig(**frozen))
    return world.model(config)


def test_image_features_take_the_place_of_their_tokens_and_of_no_others(model: GMAIVL) -> None:
    embeddings = torch.zeros(LENGTH, 1, 48)
    count = MODEL.vision.tokens_per_image
    features = torch.arange(1, 2 * count + 1.0).view(2, count, 1).expand(-1, -1, 48)
    merged = model.merge(embeddings, features, torch.tensor([40, 7]))
    expected = torch.zeros(LENGTH)
    expected[40 : 40 + count] = torch.arange(1, count + 1.0)
    expected[7 : 7 + count] = torch.arange(count + 1, 2 * count + 1.0)
    assert torch.equal(merged, expected[:, None, None].expand(-1, 1, 48))


def test_the_embedding_of_a_placeholder_does_not_matter(model: GMAIVL) -> None:
    pack = make_pack(seed=1, images=3)
    before = losses_of(model, pack)
    with torch.no_grad():
        model.language_model.embedding.word_embeddings.weight[MODEL.image_token_id] += 1.0
    assert torch.equal(losses_of(model, pack), before)


def test_each_image_matters_at_its_own_place(model: GMAIVL) -> None:
    pack = make_pack(seed=1, images=2)  # the first in the first sample, the second in the second
    swapped = dataclasses.replace(pack, pixel_values=pack.pixel_values.flip(0))
    same = pack.labels == -100
    assert torch.equal(losses_of(model, pack)[same], losses_of(model, swapped)[same])
    assert not torch.equal(losses_of(model, pack), losses_of(model, swapped))
    second_only = pack.pixel_values.clone()
    second_only[1] = 255 - second_only[1]
    changed = losses_of(model, dataclasses.replace(pack, pixel_values=second_only))
    assert torch.equal(losses_of(model, pack)[:20], changed[:20])
    assert not torch.equal(losses_of(model, pack)[20:], changed[20:])


@pytest.mark.parametrize("phase", [2, 3])
def test_a_text_only_micro_batch_gives_the_tower_a_gradient_of_zero(
    phase: int, alone: Processes
) -> None:
    model = build(alone, PHASES[phase])
    losses_of(model, make_pack(seed=1, images=0)).sum().backward()
    for name, parameter in model.vision_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("phase", PHASES)
def test_every_trained_parameter_and_no_frozen_one_has_a_gradient(
    phase: int, images: int, alone: Processes
) -> None:
    model = build(alone, PHASES[phase])
    losses_of(model, make_pack(seed=1, images=images)).sum().backward()
    trained = {1: {"projector"}, 2: {"projector", "vision_model"}, 3: PARTS}[phase]
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {n for n, _ in model.named_parameters() if n.split(".")[0] in trained}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("phase", PHASES)
def test_frozen_parts_have_no_gradient_buffer(phase: int, alone: Processes) -> None:
    model = build(alone, PHASES[phase])
    config = dataclasses.replace(CONFIG, train=TrainConfig(**PHASES[phase]))
    (wrapped,) = wrap_for_training([model], config, model.groups)
    trained = [p for p in model.parameters() if p.requires_grad]
    buffers = wrapped.buffers + wrapped.expert_parallel_buffers
    assert sum(len(buffer.params) for buffer in buffers) == len(trained)
    assert all(hasattr(p, "main_grad") == p.requires_grad for p in model.parameters())


def test_the_tower_is_not_run_for_text_when_it_does_not_train(
    alone: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(alone, {"freeze_vit": True, "freeze_projector": True})

    def unexpected(pixels: Tensor) -> Tensor:
        raise AssertionError("the tower ran")

    monkeypatch.setattr(model.vision_model, "forward", unexpected)
    assert losses_of(model, make_pack(seed=1, images=0)).isfinite().all()


@pytest.mark.parametrize(
    ("vocabulary", "ranks", "rows"), [(100, 1, 128), (128, 1, 128), (100, 2, 256), (513, 4, 1024)]
)
def test_the_vocabulary_is_padded_to_128_rows_a_rank(
    vocabulary: int, ranks: int, rows: int
) -> None:
    assert padded_vocab_size(vocabulary, ranks) == rows


def test_padded_rows_of_the_vocabulary_never_win(model: GMAIVL) -> None:
    language, pack = model.language_model, make_pack(seed=1, images=0)
    before = losses_of(model, pack)
    with torch.no_grad():
        language.output_layer.weight[MODEL.language.vocab_size :] = 1e3
        hidden = torch.randn(7, 1, MODEL.language.hidden_size)
        assert language.output_layer(hidden).shape == (7, 1, MODEL.language.vocab_size)
    losses = losses_of(model, pack)
    assert torch.equal(losses, before)
    losses.sum().backward()
    padding = language.output_layer.weight.grad[MODEL.language.vocab_size :]
    assert torch.equal(padding, torch.zeros_like(padding))


def test_what_a_checkpoint_does_not_hold_is_not_left_to_chance(alone: Processes) -> None:
    torch.use_deterministic_algorithms(True)  # fills memory that nobody initialised with NaN
    try:
        (chunk,) = build_chunks(CONFIG, alone.world(CONFIG))
    finally:
        torch.use_deterministic_algorithms(False)
    parameters = list(chunk.parameters())
    assert any(parameter.isnan().any() for parameter in parameters)
    for held in weight_pieces([chunk], CONFIG.lora):
        held.piece.tensor.fill_(0.01)
    assert all(parameter.isfinite().all() for parameter in parameters)


def test_nothing_is_compiled_on_a_cpu(model: GMAIVL) -> None:
    """A laptop may have no C++ compiler, and a short run no time for one."""
    assert hasattr(swiglu, "_torchdynamo_orig_callable")  # Megatron-Core's functions could be
    compiled = torch._dynamo.utils.counters["frames"]
    before = dict(compiled)
    losses_of(model, make_pack(seed=1, images=1)).sum().backward()
    assert dict(compiled) == before
