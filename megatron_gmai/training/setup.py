"""Builds what a run needs from its configuration: sizes, data, model, optimizer, position."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_gmai.config import Config, ModelConfig
from megatron_gmai.convert.huggingface import open_pretrained
from megatron_gmai.data.loading.batch import MicroBatch
from megatron_gmai.data.loading.dataset import PackDataset, open_dataset
from megatron_gmai.data.loading.loader import iterate
from megatron_gmai.data.prepare import prepare_data
from megatron_gmai.data.shards.format import MANIFEST_FILE
from megatron_gmai.data.shards.mean_load import images_per_pack
from megatron_gmai.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_gmai.model.gmai_vl import build_chunks
from megatron_gmai.planner.cost import typical_images
from megatron_gmai.runtime.world import World
from megatron_gmai.training.checkpoint import (
    Checkpoint,
    Position,
    load_checkpoint,
    newest_whole_checkpoint,
    open_checkpoint,
)
from megatron_gmai.training.optimizer import build_optimizer, wrap_for_training
from megatron_gmai.training.step import TrainStep
from megatron_gmai.training.weights import SeededWeights, fill
from megatron_gmai.validation import tokenizer_path

Log = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """What a run begins from, found before anything large is built."""

    resume: Checkpoint | None = None
    load: Checkpoint | None = None
    llava: Path | None = None

    @property
    def model(self) -> ModelConfig | None:
        """Sizes that the start weights dictate."""
        checkpoint = self.resume or self.load
        if checkpoint is not None:
            return checkpoint.config.model
        return None if self.llava is None else open_pretrained(self.llava).model


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


def find_start(config: Config, log: Log) -> Start:
    """Choose between resuming, weights of a checkpoint, Hugging Face weights and a fresh start.

    `--resume` wins where its folder holds a whole checkpoint; else `--load` or `--llava` count.
    """
    run = config.run
    if run.resume:
        assert run.save is not None
        checkpoint, skipped = newest_whole_checkpoint(Path(run.save))
        for reason in skipped:
            log(f"passed over a checkpoint: {reason}")
        if checkpoint is not None:
            log(f"resuming from {checkpoint.path}")
            return Start(resume=checkpoint)
        log(f"--resume: no checkpoint in {run.save}, so the run starts from the beginning")
    if run.load is not None:
        return Start(load=open_checkpoint(Path(run.load)))
    return Start(llava=Path(run.llava) if run.llava is not None else None)


def with_sizes(config: Config, start: Start) -> Config:
    """The configuration with the model sizes of the start weights, where there are any."""
    return dataclasses.replace(config, model=start.model or config.model)


def mean_images_per_pack(config: Config) -> float:
    """Of the run's shards; where they are still to be made, of packs full of single images."""
    folder = config.data.shards or config.data.dset_cache_dir
    if folder is None or not (Path(folder) / MANIFEST_FILE).is_file():
        return typical_images(config)
    vision = config.model.vision
    return images_per_pack(Path(folder), vision.tokens_per_image, config.data.max_length)


def with_data(config: Config, barrier: Callable[[], None]) -> tuple[Config, Tokenizer]:
    """Make or find the shards, then settle the vocabulary by the tokenizer."""
    work_dir = Path(config.run.work_dir)
    tokenizer_file = tokenizer_path(config)
    data = prepare_data(
        dataclasses.replace(config.data, tokenizer=str(tokenizer_file) if tokenizer_file else None),
        config.model.vision,
        default_cache_dir=str(work_dir / "shards"),
        is_builder=dist.get_rank() == 0,
        barrier=barrier,
    )
    assert data.tokenizer is not None
    tokenizer = load_tokenizer(data.tokenizer)
    language = dataclasses.replace(
        config.model.language,
        vocab_size=max(config.model.language.vocab_size, tokenizer.vocab_size),
    )
    model = dataclasses.replace(
        config.model, language=language, image_token_id=tokenizer.image_token_id
    )
    return dataclasses.replace(config, data=data, model=model), tokenizer


def build_run(config: Config, tokenizer: Tokenizer, start: Start, world: World) -> Run:
    """Model, optimizer, data stream and position of a run, from a complete configuration."""
    dataset = open_dataset(
        config.data,
        tokenizer,
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
    )


def build_model(
    config: Config, start: Start, world: World
) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """This rank's chunks and their optimizer, with the weights that the run starts from."""
    chunks = build_chunks(config, world)
    wrapped = wrap_for_training(chunks, config, world.groups)
    optimizer = build_optimizer(wrapped, config, world.device, world.groups)
    checkpoint = start.resume or start.load
    if checkpoint is not None:
        load_checkpoint(checkpoint, chunks, optimizer if start.resume else None)
    elif start.llava is not None:
        fill(chunks, open_pretrained(start.llava).weights)
    else:
        fill(chunks, SeededWeights(config.model, config.train.seed))
    if start.resume is None:
        optimizer.reload_model_params()  # fp32 masters follow the weights that were just filled in
    return wrapped, optimizer


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
        image_share=groups.image_share if world.holds_first_chunk else None,
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
