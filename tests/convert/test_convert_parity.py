"""The Megatron model and its export compute the same: packed there, sample by sample here."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from megatron_gmai.config import Config
from megatron_gmai.model.attention import Segments
from tests.convert.conftest import MODEL, Export
from tests.parallel.cases import Processes

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def hf_losses(model: Any, tokens: Tensor, labels: Tensor, pixels: Tensor) -> Tensor:
    """Losses [L] of one sample by the exported model; pixels uint8 [N, 3, I, I]."""
    batch: dict[str, Tensor] = {"input_ids": tokens[None]}
    if len(pixels):
        batch["pixel_values"] = (pixels / 255 - CLIP_MEAN) / CLIP_STD
    with torch.no_grad():
        logits = model(**batch).logits[0]
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize("tied", [False, True])
def test_the_export_computes_what_the_megatron_model_computes(
    export: Callable[..., Export], alone: Processes, tied: bool
) -> None:
    written = export(language=replace(MODEL.language, tie_word_embeddings=tied))
    config = replace(Config(), model=written.model)
    megatron = alone.model(config, written.weights)
    exported = AutoModelForImageTextToText.from_pretrained(written.folder).eval()

    generator = torch.Generator().manual_seed(0)
    image = [written.tokenizer.image_token_id] * written.model.vision.tokens_per_image
    samples = [[7, *image, 9, 11, *image, 20], [30, 31, 32, 33, 34], [40, *image, 41]]
    tokens = torch.tensor([token for sample in samples for token in sample])
    labels = torch.randint(0, 300, tokens.shape, generator=generator)
    pixels = torch.randint(0, 256, (3, 3, 28, 28), generator=generator, dtype=torch.uint8)
    bounds = torch.tensor([0, *(len(sample) for sample in samples)]).cumsum(0)
    starts = [1, 1 + 16 + 2, int(bounds[2]) + 1]
    with torch.no_grad():
        losses = megatron(
            tokens=tokens,
            position_ids=torch.cat([torch.arange(len(sample)) for sample in samples]),
            segments=Segments.from_cu_seqlens(
                bounds.int(), max(map(len, samples)), torch.device("cpu")
            ),
            labels=labels,
            pixel_values=pixels,
            image_starts=torch.tensor(starts),
        )
    images = [pixels[:2], pixels[:0], pixels[2:]]
    expected = torch.cat([
        hf_losses(exported, tokens[start:end], labels[start:end], images[n])
        for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
    ])  # fmt: skip
    assert expected.std() > 0.1
    torch.testing.assert_close(losses.flatten(), expected, rtol=1e-5, atol=1e-5)
