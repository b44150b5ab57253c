"""Builds what a run needs from its complete configuration: data, model, optimizer, position."""

import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_gmai.config import Config, DataConfig
from megatron_gmai.convert.seeded import SeededWeights
from megatron_gmai.data.loading.batch import MicroBatch
from megatron_gmai.data.loading.dataset import PackDataset, open_dataset
from megatron_gmai.data.loading.loader import iterate
from megatron_gmai.data.prepare import prepare_data
from megatron_gmai.data.text.tokenizer import load_tokenizer
from megatron_gmai.model.gmai_vl import GMAIVL, build_chunks
from megatron_gmai.runtime.world import World
from megatron_gmai.training.checkpoint import Position, load_checkpoint
from megatron_gmai.training.held_out import HeldOut, held_out_data, open_held_out
from megatron_gmai.training.optimizer import build_optimizer, wrap_for_training
from megatron_gmai.training.start import Start
from megatron_gmai.training.step import TrainStep
from megatron_gmai.training.timing import StepTimers
from megatron_gmai.training.weights import fill


@dataclass(frozen=True)
class Run:
    """A run that is ready to take its first step."""

    config: Config
    world: World
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    step: TrainStep
    dataset: PackDataset
    batches: Iterator[MicroBatch]
    position: Position
    total_iterations: int
    carried: Mapping[str, Tensor]  # on rank 0, which saves it; empty elsewhere
    held_out: Sequence[HeldOut] = ()


def prepare(config: Config, world: World) -> DataConfig:
    """Make the shards and measure them, where nobody has yet; where they lie is filled in.

    Rank 0 does the work. The others wait outside collectives, however long it takes.
    """
    # A name that ranks agree on at once; what takes long they then wait for on the file system.
    run = [uuid.uuid4().hex]
    dist.broadcast_object_list(run, src=0)
    speaks = world.rank <= 1 or os.environ.get("LOCAL_RANK") == "0"
    return prepare_data(
        config.data,
        config.model.vision,
        default_cache_dir=os.path.join(config.run.work_dir, "shards"),
        is_builder=world.is_first_rank,
        run=run[0],
        log=partial(print, flush=True) if speaks else lambda line: None,
    )


def build_run(config: Config, start: Start, world: World) -> Run:
    """Data, model, optimizer and position of a run, from a complete configuration."""
    assert config.data.tokenizer is not None
    dataset = open_dataset(
        prepare(config, world),
        load_tokenizer(config.data.tokenizer),
        config.model.vision,
        config.train.seed,
        Path(config.run.work_dir) / "rejected.jsonl" if world.is_first_rank else None,
        run=config.train.global_batch_size,
    )
    chunks, optimizer = build_model(config, start, world)
    position = start.resume.position if start.resume else Position()
    if position.bookmark is not None:
        dataset.open_at(position.bookmark)
    packs = total_packs(config, dataset, world)
    train = config.train
    step = TrainStep(
        chunks,
        optimizer,
        world,
        world.layout.micro_batches(train),
        train.micro_batch_size * config.data.max_length,
        StepTimers(world.device.is_cuda),
    )
    return Run(
        config=config,
        world=world,
        chunks=chunks,
        optimizer=optimizer,
        step=step,
        dataset=dataset,
        batches=open_batches(config, dataset, world, position, packs),
        position=position,
        total_iterations=total_iterations(config, packs, position),
        carried=start.carried() if world.is_first_rank else {},
        held_out=held_out(config, world),
    )


def held_out(config: Config, world: World) -> Sequence[HeldOut]:
    """The held-out packs by data set; none without `--valid-shards`."""
    if config.data.valid_shards is None:
        return ()
    return open_held_out(prepare(held_out_data(config), world), config)


def build_model(
    config: Config, start: Start, world: World
) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """This rank's chunks and their optimizer, with the weights that the run starts from."""
    chunks = build_chunks(config, world)
    wrapped = wrap_for_training(chunks, config, world.groups)
    optimizer = build_optimizer(wrapped, config, world.device, world.groups)
    checkpoint = start.resume or start.load
    if checkpoint is None or checkpoint.config.lora.towers:
        fill_base(chunks, config, start, world.storage)
    if config.lora.towers:
        seeded = SeededWeights(config.model, config.train.seed, config.lora)
        fill(chunks, seeded, adapters=True)
    if checkpoint is not None:
        load_checkpoint(checkpoint, chunks, optimizer if start.resume else None, world.storage)
    dist.barrier(world.storage)  # storage may be slow for some, and the next message is a step's
    if start.resume is None:
        optimizer.reload_model_params()  # fp32 masters follow the weights that were just filled in
    return wrapped, optimizer


def fill_base(
    chunks: Sequence[GMAIVL], config: Config, start: Start, group: ProcessGroup | None = None
) -> None:
    """Fill the model's own weights from where the run, or the adapters that it loads, began."""
    if start.pretrained is not None:
        fill(chunks, start.pretrained.weights)
    elif start.base is not None:
        load_checkpoint(start.base, chunks, optimizer=None, group=group)
    else:
        fill(chunks, SeededWeights(config.model, config.train.seed))


def open_batches(
    config: Config, dataset: PackDataset, world: World, position: Position, packs: int | None
) -> Iterator[MicroBatch]:
    """This data-parallel rank's micro-batches, from the position on; pixels only where needed."""
    train, groups = config.train, world.groups
    return iterate(
        dataset,
        groups.dp.rank(),
        groups.dp.size(),
        train.micro_batch_size,
        train.global_batch_size,
        start_pack=position.consumed_packs,
        total_packs=packs,
        num_workers=config.data.num_workers,
        image_share=world.image_share,
        pin_memory=world.device.is_cuda,
    )


def total_packs(config: Config, dataset: PackDataset, world: World) -> int | None:
    """Packs of a run of so many epochs, None for a run of so many steps.

    Where neither a file nor the checkpoint tells, every epoch has to be planned for it, a second
    for some million samples, so one rank does it for all.
    """
    train = config.train
    if train.train_iters is not None:
        return None
    packs = dataset.total_packs(train.epochs) if world.is_first_rank else 0
    tensor = torch.tensor([packs], dtype=torch.int64, device=world.device.torch_device)
    dist.broadcast(tensor, src=0)
    return int(tensor)


def total_iterations(config: Config, packs: int | None, position: Position) -> int:
    """Optimizer steps of the whole run; after a resume the global batch may be another one."""
    train = config.train
    if packs is None:
        assert train.train_iters is not None
        return train.train_iters
    return position.iteration + math.ceil(
        (packs - position.consumed_packs) / train.global_batch_size
    )
