"""All layouts of a model on so many GPUs, and the ones that fit by their predicted speed."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_gmai.config import Config, ParallelConfig
from megatron_gmai.layout import Layout, encodes_ahead
from megatron_gmai.layout_rules import batch_problems, layout_problems
from megatron_gmai.planner.cost import Load
from megatron_gmai.planner.hardware import Gpu
from megatron_gmai.planner.layout import balanced_layers
from megatron_gmai.planner.memory import Memory, stage_memory
from megatron_gmai.planner.speed import StepTime, step_time
from megatron_gmai.planner.vision import vision_trains

GIB = 2**30
# Shares of the layers whose attention is recomputed, each with and without the vision tower.
RECOMPUTED = tuple(itertools.product((0.0, 0.5, 1.0), (False, True)))
VISION_PHASES = ("first-stage", "all-ranks")


class Sizes(NamedTuple):
    """Of one combination."""

    tensor: int
    pipeline: int
    virtual: int
    context: int
    micro: int
    vision: str = VISION_PHASES[0]


@dataclass(frozen=True)
class Plan:
    """A layout with what is predicted for it."""

    config: Config
    layout: Layout
    memory: tuple[Memory, ...]  # of each pipeline stage
    time: StepTime

    @property
    def tightest(self) -> int:
        """The stage with the highest memory."""
        return max(range(len(self.memory)), key=lambda p: self.memory[p].peak)

    @property
    def peak_gib(self) -> float:
        return self.memory[self.tightest].peak / GIB

    def flags(self) -> str:
        """The layout as flags of the entry script."""
        parallel, train = self.config.parallel, self.config.train
        words = [f"--tp {self.layout.tensor}", f"--pp {self.layout.pipeline}"]
        if parallel.num_virtual_stages_per_pipeline_rank > 1:
            words.append(f"--vpp {parallel.num_virtual_stages_per_pipeline_rank}")
        if self.layout.context > 1:
            words.append(f"--cp {self.layout.context}")
        if parallel.pipeline_layout:
            words.append(f"--pipeline-layout {parallel.pipeline_layout}")
        if encodes_ahead(parallel):
            words.append("--vision-phase all-ranks")
        if parallel.sequence_parallel:
            words.append("--sequence-parallel")
        words.append("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather")
        words.append(f"--micro-batch-size {train.micro_batch_size}")
        if train.selective_recompute:
            words.append(f"--selective-recompute {train.selective_recompute:g}")
        if train.recompute_vit:
            words.append("--recompute-vit")
        return " ".join(words)


@dataclass(frozen=True)
class Search:
    """What a search found."""

    plans: list[Plan]  # that fit, fastest first
    too_large: list[Plan]  # that do not fit, smallest first
    refused: int  # combinations that cannot work


def search(config: Config, world_size: int, load: Load, gpu: Gpu) -> Search:
    """Judge every layout of `world_size` GPUs for this model, batch and what is trained.

    Recomputation only costs where a layout fits without: of each the fastest that fits is kept.
    """
    found = Search([], [], 0)
    for sizes in sizes_of(config, world_size, load, gpu):
        found = _judge(config, world_size, load, gpu, sizes, found)
    found.plans.sort(key=lambda made: made.time.seconds)
    found.too_large.sort(key=lambda made: made.peak_gib)
    return found


def _judge(
    config: Config, world_size: int, load: Load, gpu: Gpu, sizes: Sizes, found: Search
) -> Search:
    fitting: list[Plan] = []
    choices = tuple(recomputations(config, load))
    for choice in choices:
        candidate = candidate_of(config, world_size, load, sizes, *choice)
        if candidate is None:
            return dataclasses.replace(found, refused=found.refused + 1)
        memory = memory_of(candidate, world_size, load)
        if max(stage.peak for stage in memory) <= gpu.memory_gib * GIB:
            fitting.append(plan(candidate, world_size, load, gpu, memory))
            if choice == choices[0]:
                break
        elif choice == choices[-1] and not fitting:
            found.too_large.append(plan(candidate, world_size, load, gpu, memory))
    if fitting:
        found.plans.append(min(fitting, key=lambda made: made.time.seconds))
    return found


def recomputations(config: Config, load: Load) -> Iterator[tuple[float, bool]]:
    """What of `RECOMPUTED` can matter; `--recompute-vit` always where it was asked for."""
    has_tower = load.images > 0 and vision_trains(config.train)
    for attention, tower in RECOMPUTED:
        if tower == config.train.recompute_vit or (tower and has_tower):
            yield attention, tower


def memory_of(config: Config, world_size: int, load: Load) -> tuple[Memory, ...]:
    """The memory of each pipeline stage."""
    layout = Layout.of(config.parallel, world_size)
    return tuple(stage_memory(config, layout, p, load) for p in range(layout.pipeline))


def plan(
    config: Config,
    world_size: int,
    load: Load,
    gpu: Gpu,
    memory: tuple[Memory, ...] | None = None,
) -> Plan:
    """Predict one layout."""
    layout = Layout.of(config.parallel, world_size)
    memory = memory or memory_of(config, world_size, load)
    return Plan(config, layout, memory, step_time(config, layout, load, gpu))


def sizes_of(config: Config, world_size: int, load: Load, gpu: Gpu) -> Iterator[Sizes]:
    """Every combination that divides the world; images on all ranks where that can pay, or
    wherever the configuration asks for it."""
    powers = [2**k for k in range(11)]
    layers = config.model.language.num_layers
    tensors = [n for n in powers if n <= gpu.per_node]
    pipelines = [n for n in powers if n <= layers]
    for sizes in itertools.starmap(
        Sizes, itertools.product(tensors, pipelines, (1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8))
    ):
        model = sizes.tensor * sizes.pipeline * sizes.context
        interleaved = sizes.virtual == 1 or 1 < sizes.pipeline <= layers // sizes.virtual
        is_near = sizes.tensor * sizes.context <= gpu.per_node
        if world_size % model == 0 and interleaved and is_near:
            for vision in _vision_phases(config, load, sizes.pipeline):
                yield sizes._replace(vision=vision)


def _vision_phases(config: Config, load: Load, stages: int) -> tuple[str, ...]:
    if encodes_ahead(config.parallel):
        return ("all-ranks",)
    return VISION_PHASES if stages > 1 and load.images else VISION_PHASES[:1]


def candidate_of(
    config: Config,
    world_size: int,
    load: Load,
    sizes: Sizes,
    recompute: float,
    recompute_vit: bool,
) -> Config | None:
    """The configuration of a combination; None if the rules refuse it."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        num_virtual_stages_per_pipeline_rank=sizes.virtual,
        context_parallel_size=sizes.context,
        vision_phase=sizes.vision,
        sequence_parallel=sizes.tensor > 1,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )
    train = dataclasses.replace(
        config.train,
        micro_batch_size=sizes.micro,
        selective_recompute=recompute,
        recompute_vit=recompute_vit,
    )
    made = dataclasses.replace(config, parallel=parallel, train=train)
    if sizes.pipeline > 1:
        counts = balanced_layers(made, load)
        listed = None if len(set(counts)) == 1 else ",".join(map(str, counts))
        parallel = dataclasses.replace(parallel, pipeline_layout=listed)
        made = dataclasses.replace(made, parallel=parallel)
    rules = (layout_problems, batch_problems)
    return None if any(True for rule in rules for _ in rule(made, world_size)) else made
