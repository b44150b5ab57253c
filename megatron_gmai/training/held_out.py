"""Validation: the loss on held-out packs of each data set, the same packs every time.

Nothing of it touches training: packs come from iterators of their own, no random number is drawn
(dropout is off), and gradients, optimizer and data order stay as they are.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megatron_gmai.config import Config, DataConfig
from megatron_gmai.data.loading.batch import MicroBatch
from megatron_gmai.data.loading.dataset import PackDataset
from megatron_gmai.data.loading.loader import iterate
from megatron_gmai.data.plan.windows import PlanSettings
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.sources.mixture import Use
from megatron_gmai.data.text.encoder import make_encoder
from megatron_gmai.data.text.tokenizer import load_tokenizer
from megatron_gmai.layout import virtual_stages
from megatron_gmai.runtime.world import World
from megatron_gmai.training.step import Evaluated, TrainStep

# The order of held-out packs, whatever the run's seed: losses of several runs can be compared.
_SEED = 0


@dataclass(frozen=True)
class HeldOut:
    """The held-out packs of one data set."""

    name: str
    dataset: PackDataset
    packs: int  # of these the first so many


def held_out_data(config: Config) -> Config:
    """The configuration with `--valid-shards` in the place of the training data."""
    data = dataclasses.replace(config.data, shards=config.data.valid_shards, datasets=None)
    return dataclasses.replace(config, data=data)


def open_held_out(data: DataConfig, config: Config) -> list[HeldOut]:
    """The held-out packs of each data set in `data.shards`; sets without a usable sample have none.

    Every data set counts once and unaugmented, whatever its ratio in training.
    """
    assert data.shards is not None and data.tokenizer is not None
    shards = Shards(data.shards)
    encoder = make_encoder(data, load_tokenizer(data.tokenizer), config.model.vision)
    settings = PlanSettings(
        _SEED, data.max_length, data.dset_pack_level, max_images=data.max_images_per_pack
    )
    most = config.run.eval_iters * config.train.global_batch_size
    sources, found = shards.manifest.sources, []
    for chosen, source in enumerate(sources):
        uses = [Use(float(number == chosen), False) for number in range(len(sources))]
        dataset = PackDataset(
            shards, encoder, config.model.vision, uses, settings, data.pad_to_square
        )
        if packs := min(most, dataset.plan.total(0)):
            found.append(HeldOut(source.name, dataset, packs))
    return found


def evaluate(
    held_out: HeldOut,
    config: Config,
    world: World,
    step: TrainStep,
    over: Callable[[Iterable[MicroBatch]], Iterator[MicroBatch]],
) -> Evaluated:
    """The loss on one data set, equal on every rank; `over` sees each micro-batch pass.

    All of its packs are one step without a backward pass, filled up with empty packs to what the
    data-parallel ranks and the pipeline share out evenly.
    """
    count = micro_batches(config, world, held_out.packs)
    per_micro_batch = config.train.micro_batch_size * world.groups.dp.size()
    batches = iterate(
        held_out.dataset,
        world.groups.dp.rank(),
        world.groups.dp.size(),
        config.train.micro_batch_size,
        count * per_micro_batch,
        total_packs=held_out.packs,
        num_workers=config.data.num_workers,
        image_share=world.image_share,
        pin_memory=world.device.is_cuda,
    )
    return step.evaluate(over(batches), count)


def micro_batches(config: Config, world: World, packs: int) -> int:
    """Of each data-parallel rank; interleaved stages take them in groups of the pipeline's size."""
    parallel, groups = config.parallel, world.groups
    count = math.ceil(packs / (config.train.micro_batch_size * groups.dp.size()))
    if virtual_stages(parallel, config.model.language.num_layers) > 1:
        count = math.ceil(count / groups.pp.size()) * groups.pp.size()
    return count
