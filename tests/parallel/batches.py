"""Packs made of numbers, for tests of the model: images spread unevenly, some packs text-only.

Every pack has LENGTH tokens: two samples and a padding tail.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_gmai.config import (
    Config,
    DataConfig,
    LanguageConfig,
    ModelConfig,
    TrainConfig,
    VisionConfig,
)
from megatron_gmai.data.loading.batch import MicroBatch
from megatron_gmai.model.attention import Segments

# The vocabulary is padded to 128 rows on one rank and to 256 on two.
MODEL = ModelConfig(
    vision=VisionConfig(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=2,
        ffn_hidden_size=48,
        patch_size=14,
        image_size=28,
    ),
    language=LanguageConfig(
        num_layers=4,
        hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=80,
        vocab_size=100,
        max_position_embeddings=64,
    ),
    image_token_id=99,
)
LENGTH = 64
BOUNDS = (0, 20, 44, LENGTH)
IMAGE_STARTS = (3, 24, 32)  # at most three images a pack, of four tokens each
PACKS = 4
# Images of each pack of a global batch; steps follow each other and start over.
IMAGES = ((0, 3, 1, 2), (2, 0, 0, 1), (0, 0, 0, 0), (3, 1, 0, 2))
CONFIG = Config(
    model=MODEL,
    data=DataConfig(max_length=LENGTH),
    # With Adam's usual epsilon, gradients that are rounding noise (those of key biases, which
    # cannot matter) move weights as far as any other.
    train=TrainConfig(lr=1e-3, wd=0.1, adam_eps=1e-4, global_batch_size=PACKS),
)


def global_batch(step: int) -> list[MicroBatch]:
    """The packs of one optimizer step."""
    images = IMAGES[step % len(IMAGES)]
    return [make_pack(step * PACKS + index, count) for index, count in enumerate(images)]


def make_pack(seed: int, images: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, 90, (LENGTH,), generator=generator)
    starts = torch.tensor(IMAGE_STARTS[:images], dtype=torch.int64)
    placeholders = (starts[:, None] + torch.arange(MODEL.vision.tokens_per_image)).flatten()
    tokens[placeholders] = MODEL.image_token_id
    labels = tokens.roll(-1)
    labels[labels == MODEL.image_token_id] = -100
    labels[[stop - 1 for stop in BOUNDS[1:]]] = -100
    labels[BOUNDS[-2] :] = -100
    labels[: seed % 7] = -100  # each pack has another number of supervised tokens
    size = MODEL.vision.image_size
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        position_ids=torch.cat([torch.arange(b - a) for a, b in zip(BOUNDS, BOUNDS[1:])]),  # noqa: B905
        cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32),
        max_seqlen=max(b - a for a, b in zip(BOUNDS, BOUNDS[1:])),  # noqa: B905
        pixel_values=torch.randint(
            0, 256, (images, 3, size, size), generator=generator, dtype=torch.uint8
        ),
        image_starts=starts,
        num_samples=2,
        num_tokens=BOUNDS[-2],
        keys=(f"{seed}-0", f"{seed}-1"),
    )


def join(packs: list[MicroBatch]) -> MicroBatch:
    """Several packs as one micro-batch."""
    shifts = range(0, LENGTH * len(packs), LENGTH)
    bounds = [pack.cu_seqlens[1:] + shift for pack, shift in zip(packs, shifts, strict=True)]
    starts = [pack.image_starts + shift for pack, shift in zip(packs, shifts, strict=True)]
    return MicroBatch(
        tokens=torch.cat([pack.tokens for pack in packs]),
        labels=torch.cat([pack.labels for pack in packs]),
        position_ids=torch.cat([pack.position_ids for pack in packs]),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), *bounds]),
        max_seqlen=max(pack.max_seqlen for pack in packs),
        pixel_values=torch.cat([pack.pixel_values for pack in packs]),
        image_starts=torch.cat(starts),
        num_samples=sum(pack.num_samples for pack in packs),
        num_tokens=sum(pack.num_tokens for pack in packs),
        keys=tuple(key for pack in packs for key in pack.keys),
    )


def losses_of(model: Callable[..., Tensor], batch: MicroBatch) -> Tensor:
    """The loss of each token, fp32 [T], of a model that one rank holds whole."""
    return model(
        tokens=batch.tokens,
        position_ids=batch.position_ids,
        segments=Segments.from_cu_seqlens(batch.cu_seqlens, batch.max_seqlen, torch.device("cpu")),
        labels=batch.labels,
        pixel_values=batch.pixel_values,
        image_starts=batch.image_starts,
    )
