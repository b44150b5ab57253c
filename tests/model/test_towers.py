"""The two towers compute what transformers' classes compute with the same weights."""

from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from megatron_gmai.convert.huggingface import open_pretrained
from megatron_gmai.model.attention import Segments
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.model.vit import CLIP_MEAN, CLIP_STD
from megatron_gmai.training.weights import fill
from tests.llava import random_llava
from tests.parallel.batches import CONFIG, MODEL
from tests.parallel.cases import Processes


@pytest.fixture
def llava() -> LlavaForConditionalGeneration:
    """Random weights in transformers' classes, large enough that every part matters."""
    return random_llava(MODEL, std=0.2)


@pytest.fixture
def megatron(alone: Processes, llava: LlavaForConditionalGeneration, tmp_path: Path) -> GMAIVL:
    """The same weights in our classes."""
    llava.save_pretrained(tmp_path)
    model = alone.model(CONFIG)
    fill([model], open_pretrained(tmp_path).weights)
    return model


@torch.no_grad()
def test_vision_features_are_those_before_the_last_layer(
    megatron: GMAIVL, llava: LlavaForConditionalGeneration
) -> None:
    size = MODEL.vision.image_size
    pixels = torch.randint(0, 256, (5, 3, size, size), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    output = llava.model.vision_tower((pixels / 255 - mean) / std, output_hidden_states=True)
    features = megatron.vision_model(pixels)
    assert features.shape == (5, MODEL.vision.tokens_per_image, MODEL.vision.hidden_size)
    expected = output.hidden_states[-2][:, 1:]  # without the class token
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_image_has_the_same_features_beside_others(megatron: GMAIVL) -> None:
    size = MODEL.vision.image_size
    pixels = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    single = torch.cat([megatron.vision_model(image[None]) for image in pixels])
    torch.testing.assert_close(megatron.vision_model(pixels), single, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_projected_features_are_those_of_transformers(
    megatron: GMAIVL, llava: LlavaForConditionalGeneration
) -> None:
    features = torch.randn(2, MODEL.vision.tokens_per_image, MODEL.vision.hidden_size)
    expected = llava.model.multi_modal_projector(features)
    torch.testing.assert_close(megatron.projector(features), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_language_model_gives_the_logits_of_llama(
    megatron: GMAIVL, llava: LlavaForConditionalGeneration
) -> None:
    lengths = [30, 1, 20]
    tokens = torch.randint(0, 90, (sum(lengths),))
    segments = Segments.from_cu_seqlens(
        torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int(), 30, torch.device("cpu")
    )
    model = megatron.language_model
    positions = torch.cat([torch.arange(length) for length in lengths])
    logits = model.output_layer(model(model.embed(tokens[None]), positions, segments))[:, 0]
    expected = [
        llava.lm_head(llava.model.language_model(input_ids=part[None]).last_hidden_state)[0]
        for part in tokens.split(lengths)
    ]
    assert logits.shape == (sum(lengths), MODEL.language.vocab_size)
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-3)
