"""Packs made up for a dry run: as many tokens and images as real ones, and nothing in them."""

import itertools
from collections.abc import Iterator

import torch

from megatron_gmai.config import Config
from megatron_gmai.data.loading.batch import MicroBatch


def made_up(config: Config, images_per_pack: int) -> Iterator[MicroBatch]:
    """Endless micro-batches of full packs: one sample an image, each image at its sample's start.

    Every token has a label: the most that a pack can cost.
    Raises ValueError where the images do not fit into a pack.
    """
    length, tokens_per_image = config.data.max_length, config.model.vision.tokens_per_image
    samples = max(1, images_per_pack)
    if images_per_pack * (tokens_per_image + 2) > length:
        raise ValueError(
            f"{images_per_pack} images of {tokens_per_image} tokens do not fit into a pack of "
            f"{length}: give fewer, or a larger --max-length"
        )
    packs = config.train.micro_batch_size
    bounds = [round(i * length / samples) for i in range(samples * packs + 1)]
    sizes = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    starts = torch.tensor(bounds[:-1] if images_per_pack else [], dtype=torch.int64)
    size = config.model.vision.image_size
    for number in itertools.count():
        yield MicroBatch(
            tokens=torch.ones(length * packs, dtype=torch.int64),
            labels=torch.ones(length * packs, dtype=torch.int64),
            position_ids=torch.cat([torch.arange(size) for size in sizes]),
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            max_seqlen=max(sizes),
            pixel_values=torch.zeros(len(starts), 3, size, size, dtype=torch.uint8),
            image_starts=starts,
            num_samples=len(sizes),
            num_tokens=length * packs,
            keys=(),
            first_image=number * len(starts),
        )
