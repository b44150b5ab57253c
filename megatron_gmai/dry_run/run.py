"""One rank's training step, run for its shapes: what it holds, allocates, computes and sends."""

import gc
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_gmai.config import Config
from megatron_gmai.data.loading.batch import MicroBatch
from megatron_gmai.dry_run.absent import device_of, world_of
from megatron_gmai.dry_run.collectives import Call
from megatron_gmai.dry_run.counter import Block, DeviceCounter, Wait
from megatron_gmai.dry_run.packs import made_up
from megatron_gmai.dry_run.watch import watch
from megatron_gmai.layout import Layout, virtual_stages
from megatron_gmai.model.gmai_vl import GMAIVL, build_chunks
from megatron_gmai.runtime.world import World
from megatron_gmai.training.checkpoint import pieces_to_write
from megatron_gmai.training.encode_ahead import EncodedStep
from megatron_gmai.training.optimizer import build_optimizer, wrap_for_training
from megatron_gmai.training.optimizer_state import allocate, set_steps
from megatron_gmai.training.pieces import Piece
from megatron_gmai.training.step import Input, TrainStep


@dataclass
class RankReport:
    """What a dry run found out about one rank. Bytes, and floating-point operations."""

    rank: int
    stage: int  # of the pipeline
    parameters: int
    trainable_parameters: int
    micro_batches: int  # of the step that was run
    static: dict[str, int] = field(default_factory=dict)  # by kind, between steps
    peak: dict[str, int] = field(default_factory=dict)  # by kind, at the highest point
    peak_place: str = ""
    largest: list[Block] = field(default_factory=list)  # alive at the peak
    flops: dict[str, int] = field(default_factory=dict)  # by kind
    collectives: dict[str, Call] = field(default_factory=dict)  # "group operator"
    launches: int = 0
    waits: list[tuple[Wait, int]] = field(default_factory=list)  # and how often
    single_precision: list[tuple[Wait, int]] = field(default_factory=list)
    checkpoint_bytes: int = 0  # that this rank writes, and copies to the host with --async-save
    seconds: float = 0.0

    @property
    def static_bytes(self) -> int:
        return sum(self.static.values())

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


def dry_run(
    config: Config, rank: int, world_size: int, images_per_pack: int, kind: str = "cuda"
) -> RankReport:
    """Build rank `rank` of `world_size` and take one step, on a device that is not there.

    The step has as many micro-batches as the pipeline needs to be full, at most the run's own.
    `kind` is the path of the code, "cuda" or "cpu". Raises ValueError for a layout that does not
    divide or a pack that does not hold the images.
    """
    began = time.monotonic()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    counter = DeviceCounter(device_of(kind), fake)
    opened = world_of(config, rank, world_size, kind, counter.note_synchronize)
    with opened as world, fake, counter:
        report = count_step(config, world, counter, images_per_pack)
    report.seconds = time.monotonic() - began
    return report


def count_step(
    config: Config, world: World, counter: DeviceCounter, images_per_pack: int
) -> RankReport:
    """Build and step inside the counter."""
    gc.freeze()  # what lives by now holds no tensor of this run: collecting need not look at it
    try:
        chunks, step = build(config, world, counter)
        gc.collect()  # tensors in reference cycles would be freed at some time or other
    finally:
        gc.unfreeze()
    report = RankReport(
        rank=dist.get_rank(),
        stage=world.groups.pp.rank(),
        parameters=sum(p.numel() for chunk in chunks for p in chunk.parameters()),
        trainable_parameters=sum(
            p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad
        ),
        micro_batches=step.num_microbatches,
    )
    report.static = by_kind(block for block in counter.blocks if block.died is None)
    pieces = saved_pieces(chunks, step.optimizer, config)
    report.checkpoint_bytes = sum(piece.tensor.nbytes for piece in pieces)
    begin = counter.events
    watch(chunks, counter)
    forget_work(counter)
    gc.disable()
    try:
        with counter.during("activations", "between micro-batches"):
            step(made_up(config, images_per_pack), config.train.lr)
    finally:
        gc.enable()
    alive = alive_at_peak(counter.blocks, begin)
    report.peak = by_kind(alive)
    report.peak_place = max(alive, key=lambda block: block.born).place
    report.largest = sorted(alive, key=lambda block: -block.bytes)[:10]
    report.flops = dict(counter.flops)
    report.collectives = {" ".join(key): call for key, call in sorted(counter.calls.items())}
    report.launches = counter.launches
    report.waits = counter.waits.most_common()
    report.single_precision = counter.single_precision.most_common()
    return report


class LastOfStep(TrainStep):
    """The last micro-batches of a step of `whole`.

    It makes a difference where the images of all are encoded together: their features stay in
    memory, and those of the micro-batches that have gone before have their gradients.
    """

    whole = 0

    def inputs(
        self, drawn: Iterator[MicroBatch], num_microbatches: int
    ) -> tuple[Iterator[Input], EncodedStep | None]:
        inputs, encoded = super().inputs(drawn, self.whole)
        if encoded is None:
            return inputs, None
        gone = self.whole - num_microbatches
        for leaf in encoded.leaves[:gone]:
            if leaf is not None and leaf.requires_grad:
                leaf.grad = torch.empty_like(leaf)
        return itertools.islice(inputs, gone, None), encoded


def build(config: Config, world: World, counter: DeviceCounter) -> tuple[list[GMAIVL], TrainStep]:
    """The chunks of this rank and their step, by the code of a real run; weights stay unfilled."""
    counter.group_names = group_names(world)
    chunks = build_chunks(config, world)
    with counter.during("gradients", "gradient buffers"):
        wrapped = wrap_for_training(chunks, config, world.groups)
    with counter.during("optimizer", "optimizer"):
        optimizer = build_optimizer(wrapped, config, world.device, world.groups)
        allocate(optimizer)  # moments, which the first step would create
        set_steps(optimizer, 0)
    label_buffers(chunks, counter)
    optimizer.step = counter.wrap("optimizer", "optimizer step", optimizer.step)
    step = LastOfStep(
        wrapped,
        optimizer,
        world,
        micro_batches(config, world.layout),
        config.train.micro_batch_size * config.data.max_length,
    )
    step.whole = world.layout.micro_batches(config.train)
    step.reduce_gradients = counter.wrap("gradients", "gradient reduction", step.reduce_gradients)
    return chunks, step


def saved_pieces(chunks: list[GMAIVL], optimizer: MegatronOptimizer, config: Config) -> list[Piece]:
    """What this rank writes in a checkpoint."""
    weights_only = config.run.checkpoint_drop_optimizer
    return pieces_to_write(chunks, None if weights_only else optimizer, config)


def micro_batches(config: Config, layout: Layout) -> int:
    """As many as fill the pipeline: with more, memory is the same and work only repeats."""
    stages = layout.pipeline
    virtual = virtual_stages(config.parallel, config.model.language.num_layers)
    enough = 2 * stages if virtual > 1 else stages + 1
    return min(enough, layout.micro_batches(config.train))


def group_names(world: World) -> dict[tuple[int, ...], str]:
    """The ranks of each group -> its name; of groups with the same ranks the first one's."""
    groups = world.groups
    named = {
        "TP": groups.tp,
        "CP": groups.cp,
        "PP": groups.pp,
        "DP x CP": groups.dp_cp,
        "DP": groups.dp,
        "TP x CP": groups.images,
        "TP x DP x CP": groups.mcore.tp_dp_cp,
        "TP x PP": groups.mcore.mp,
        "world": dist.group.WORLD,
    }
    names: dict[tuple[int, ...], str] = {}
    for name, group in named.items():
        names.setdefault(tuple(dist.get_process_group_ranks(group)), name)
    return names


def label_buffers(chunks: list[GMAIVL], counter: DeviceCounter) -> None:
    """Buffers are made together: tell those of weights and gradients apart by their tensors."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            for tensor, kind in ((parameter.data, "weights"), (_gradient(parameter), "gradients")):
                block = None if tensor is None else counter.block_of(tensor)
                if block is not None:
                    block.kind = kind


def _gradient(parameter: Any) -> Tensor | None:
    return getattr(parameter, "main_grad", None)


def by_kind(blocks: Iterable[Block]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for block in blocks:
        sums[block.kind] += block.bytes
    return dict(sums)


def alive_at_peak(blocks: list[Block], begin: int) -> list[Block]:
    """The blocks that are alive where their sum is highest, from event `begin` on."""
    changes = [(block.born, block.bytes) for block in blocks]
    changes += [(block.died, -block.bytes) for block in blocks if block.died is not None]
    live = highest = 0
    peak = begin
    for event, change in sorted(changes):
        live += change
        if event > begin and live > highest:
            highest, peak = live, event
    return [b for b in blocks if b.born <= peak and (b.died is None or b.died > peak)]


def forget_work(counter: DeviceCounter) -> None:
    """Building is over: count the step's work alone."""
    counter.launches = 0
    for table in (counter.flops, counter.calls, counter.waits, counter.single_precision):
        table.clear()
