"""Models with the step that trains them, and packs of numbers for them."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core import parallel_state

from megatron_gmai.config import IGNORE_INDEX, Config
from megatron_gmai.data.loading.batch import MicroBatch
from megatron_gmai.model.gmai_vl import GMAIVL, build_chunks
from megatron_gmai.runtime.device import Device, choose_device
from megatron_gmai.runtime.groups import initialize_distributed
from megatron_gmai.runtime.implementation import Implementation
from megatron_gmai.runtime.world import World, lay_out
from megatron_gmai.training.optimizer import build_optimizer, wrap_for_training
from megatron_gmai.training.step import TrainStep

Fill = Callable[[Sequence[GMAIVL]], None]


def join(device: str, dtype: str) -> Device:
    """Choose the device of this process and join the others; fp32 means fp32 everywhere."""
    chosen = choose_device(device, dtype)
    torch.backends.cudnn.allow_tf32 = False  # the patch embedding's convolution
    initialize_distributed(chosen, timeout_minutes=2)
    return chosen


def world_for(config: Config, device: Device, implementation: Implementation) -> World:
    """The world of this layout, after those of others in the same processes."""
    parallel_state.destroy_model_parallel()
    return lay_out(device, config, implementation)


def trainer(config: Config, world: World, fill: Fill) -> TrainStep:
    """A model with an optimizer, its weights filled by `fill`, and the step that trains it."""
    chunks = build_chunks(config, world)
    wrapped = wrap_for_training(chunks, config, world.groups)
    optimizer = build_optimizer(wrapped, config, world.device, world.groups)
    fill(chunks)
    optimizer.reload_model_params()
    train = config.train
    tokens = train.micro_batch_size * config.data.max_length
    return TrainStep(wrapped, optimizer, world, world.layout.micro_batches(train), tokens)


@torch.no_grad()
def fill_on_device(chunks: Sequence[GMAIVL]) -> None:
    """Numbers with which a large model computes something finite, without making them on a host."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0, 0.02)


def own_packs(config: Config, world: World, step: int) -> Iterator[MicroBatch]:
    """This data-parallel rank's packs of a step: random tokens, and none to two images each."""
    count = config.train.global_batch_size // world.layout.data
    first = step * config.train.global_batch_size + world.groups.dp.rank() * count
    for number in range(first, first + count):
        yield random_pack(config, number, images=number % 3)


def random_pack(config: Config, seed: int, images: int) -> MicroBatch:
    """Two samples and a tail of padding; at most one image in each sample."""
    vision, length = config.model.vision, config.data.max_length
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.tensor([0, 2 * length // 5, 4 * length // 5, length], dtype=torch.int32)
    tokens = torch.randint(
        1, config.model.language.vocab_size, (length,), generator=generator, dtype=torch.int64
    )
    starts = bounds[:images].long() + 3
    positions = (starts[:, None] + torch.arange(vision.tokens_per_image)).flatten()
    tokens[positions] = config.model.image_token_id
    labels = tokens.roll(-1)
    labels[labels == config.model.image_token_id] = IGNORE_INDEX
    labels[bounds[1:] - 1] = IGNORE_INDEX
    labels[bounds[2] :] = IGNORE_INDEX
    lengths = bounds.diff().tolist()
    size = (images, 3, vision.image_size, vision.image_size)
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=bounds,
        max_seqlen=max(lengths),
        pixel_values=torch.randint(0, 256, size, generator=generator, dtype=torch.uint8),
        image_starts=starts,
        num_samples=2,
        num_tokens=int(bounds[2]),
        keys=(),
    )


def replaced(config: Config, section: str, **values: object) -> Config:
    """The configuration with other values in one section."""
    changed = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: changed})
