"""One parity case: a layout, a training stage, and what its steps gave."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_gmai.config import Config, ParallelConfig
from megatron_gmai.convert.seeded import SeededWeights
from megatron_gmai.convert.sharding import cut_of, unshard
from megatron_gmai.data.loading.batch import MicroBatch
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.model.names import canonical_name
from megatron_gmai.runtime import cpu
from megatron_gmai.runtime.device import DTYPES, Device, choose_device
from megatron_gmai.runtime.groups import (
    Groups,
    build_groups,
    destroy_groups,
    initialize_distributed,
    seed_everything,
)
from megatron_gmai.training.optimizer import build_optimizer, wrap_for_training
from megatron_gmai.training.step import StepResult, TrainStep
from megatron_gmai.training.weights import fill
from tests.parallel.batches import CONFIG, LENGTH, MODEL, PACKS, global_batch, join

STEPS = 4
STAGES: dict[int, dict[str, Any]] = {
    1: {"freeze_vit": True, "freeze_llm": True},
    2: {"freeze_llm": True},
    3: {},
}


@dataclass(frozen=True)
class Case:
    """A layout (of the world it is run in) and a stage; `fault` plants a bug on purpose."""

    name: str
    parallel: ParallelConfig = ParallelConfig()
    stage: int = 3
    micro_batch_size: int = 1
    selective_recompute: float = 0.0
    fault: str = "none"
    dtype: str = "fp32"

    @property
    def config(self) -> Config:
        train = dataclasses.replace(
            CONFIG.train,
            micro_batch_size=self.micro_batch_size,
            selective_recompute=self.selective_recompute,
            **STAGES[self.stage],
        )
        return dataclasses.replace(CONFIG, parallel=self.parallel, train=train)


@dataclass
class Outcome:
    """What the steps of one case gave, the same on every rank."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)  # whole, by canonical name
    drifted: list[str] = field(default_factory=list)  # weights whose copies differ between ranks
    encoded: list[int] = field(default_factory=list)  # what identifies the images, over all ranks


class World:
    """The processes of this world: the groups are built anew for each case."""

    def __init__(self) -> None:
        with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "64"}):  # one thread
            self.device: Device = choose_device("cpu", "fp32")
        initialize_distributed(self.device, timeout_minutes=1)

    def groups(self, parallel: ParallelConfig) -> Groups:
        parallel_state.destroy_model_parallel()
        groups = build_groups(parallel, timeout_minutes=1)
        seed_everything(1)
        return groups

    def close(self) -> None:
        """Leave the world and give torch its own functions back."""
        destroy_groups()
        cpu.uninstall()


def run_cases(cases: list[Case], folder: Path) -> None:
    """Run each case in this world and write its outcome to `folder/NAME.pt`."""
    world = World()
    for case in cases:
        outcome = run_case(case, world)
        if dist.get_rank() == 0:
            torch.save(vars(outcome), folder / f"{case.name}.pt")
    dist.barrier()


def run_case(case: Case, world: World) -> Outcome:
    with planted(case.fault):
        trainer = Trainer(case, world)
        outcome = Outcome()
        if trainer.groups.is_first_stage:
            trainer.model.vision_model.register_forward_pre_hook(
                lambda tower, arguments: outcome.encoded.extend(identify(arguments[0]))
            )
        for iteration in range(STEPS):
            result = trainer.step(iteration)
            outcome.losses.append(result.loss)
            outcome.grad_norms.append(result.grad_norm)
    if case.parallel.overlap_param_gather:
        trainer.wrapped.start_param_sync(force_sync=True)  # as the next forward pass would
    outcome.weights, outcome.drifted = whole_weights(trainer.model, trainer.groups)
    everywhere: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, outcome.encoded)
    outcome.encoded = sorted(number for numbers in everywhere for number in numbers)
    return outcome


class Trainer:
    """A model of this case's layout with its optimizer, from the same start weights every time."""

    def __init__(self, case: Case, world: World) -> None:
        self.case, self.config = case, case.config
        self.device = dataclasses.replace(world.device, dtype=DTYPES[case.dtype])
        self.groups = world.groups(case.parallel)
        self.model = GMAIVL(self.config, self.device, self.groups)
        fill(self.model, SeededWeights(MODEL, seed=1))
        self.wrapped = wrap_for_training(self.model, self.config, self.groups)
        self.optimizer = build_optimizer(self.wrapped, self.config, self.device, self.groups)
        self.optimizer.reload_model_params()
        packs = PACKS // self.groups.dp.size()
        self._step = TrainStep(
            self.wrapped,
            self.optimizer,
            self.device,
            self.groups,
            packs // case.micro_batch_size,
            LENGTH * case.micro_batch_size,
        )

    def step(self, iteration: int) -> StepResult:
        batches = share(iteration, self.case.micro_batch_size, self.groups)
        return self._step(batches, self.config.train.lr)


def identify(pixels: Tensor) -> list[int]:
    """A number for each image that is not blank."""
    sums = (pixels.flatten(1).long() * torch.arange(1, pixels[0].numel() + 1)).sum(1)
    return [number for number in sums.tolist() if number]


def share(iteration: int, micro_batch_size: int, groups: Groups) -> Iterator[MicroBatch]:
    """This data-parallel rank's micro-batches of a step."""
    packs = global_batch(iteration)
    size = PACKS // groups.dp.size()
    mine = packs[groups.dp.rank() * size : (groups.dp.rank() + 1) * size]
    for start in range(0, size, micro_batch_size):
        yield join(mine[start : start + micro_batch_size])


def whole_weights(model: GMAIVL, groups: Groups) -> tuple[dict[str, Tensor], list[str]]:
    """Every weight put together from the ranks, and the names whose copies are not identical."""
    local = {
        canonical_name(model, name): parameter.detach().clone()
        for name, parameter in model.named_parameters()
    }
    ranks: list[tuple[int, int, dict[str, Tensor]]] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(ranks, (groups.tp.rank(), groups.dp.rank(), local))
    whole, drifted = {}, []
    for name in SeededWeights(MODEL, seed=1):
        pieces: dict[int, Tensor] = {}
        for tp_rank, _, tensors in ranks:
            if name in tensors:
                tp_rank = 0 if cut_of(name) == "none" else tp_rank
                kept = pieces.setdefault(tp_rank, tensors[name])
                if not torch.equal(kept, tensors[name]):
                    drifted.append(name)
        parts = [pieces[rank] for rank in sorted(pieces)]
        whole[name] = unshard(name, parts, MODEL.language.vocab_size)
    return whole, drifted


def planted(fault: str) -> AbstractContextManager[Any]:
    """A mistake of the kind that the comparison has to reveal."""
    if fault == "none":
        return nullcontext()
    if fault == "vision gradients not summed over TP":

        def only_megatron(*arguments: Any, groups: Groups, **options: Any) -> None:
            finalize_model_grads(*arguments, **options)

        return mock.patch("megatron_gmai.training.step.finalize_gradients", only_megatron)
    assert fault == "vision gradients counted once per TP rank"

    def summed(features: Tensor, tensor_parallel_output_grad: bool, group: Any) -> Tensor:
        return gather_from_sequence_parallel_region(features, True, group=group)

    target = "megatron_gmai.model.vision_parallel.gather_from_sequence_parallel_region"
    return mock.patch(target, summed)
