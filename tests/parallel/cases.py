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
from megatron_gmai.convert.sharding import cut_of, unshard
from megatron_gmai.data.batch import MicroBatch
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.model.names import canonical_name
from megatron_gmai.runtime import cpu
from megatron_gmai.runtime.device import Device, choose_device
from megatron_gmai.runtime.groups import (
    Groups,
    build_groups,
    destroy_groups,
    initialize_distributed,
    seed_everything,
)
from megatron_gmai.training.optimizer import build_optimizer, wrap_for_training
from megatron_gmai.training.step import TrainStep
from megatron_gmai.training.weights import SeededWeights, fill
from tests.parallel.batches import CONFIG, LENGTH, MODEL, PACKS, global_batch, join

STEPS = 4
STAGES = {
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
    config = case.config
    groups = world.groups(case.parallel)
    with planted(case.fault):
        model = GMAIVL(config, world.device, groups)
        fill(model, SeededWeights(MODEL, seed=1))
        wrapped = wrap_for_training(model, config, groups)
        optimizer = build_optimizer(wrapped, config, world.device, groups)
        count = PACKS // (groups.dp.size() * case.micro_batch_size)
        tokens = LENGTH * case.micro_batch_size
        step = TrainStep(wrapped, optimizer, world.device, groups, count, tokens)
        outcome = Outcome()
        for iteration in range(STEPS):
            result = step(share(iteration, case.micro_batch_size, groups), config.train.lr)
            outcome.losses.append(result.loss)
            outcome.grad_norms.append(result.grad_norm)
    if config.parallel.overlap_param_gather:
        wrapped.start_param_sync(force_sync=True)  # the next forward pass would have done it
    outcome.weights = whole_weights(model, groups)
    return outcome


def share(iteration: int, micro_batch_size: int, groups: Groups) -> Iterator[MicroBatch]:
    """This data-parallel rank's micro-batches of a step."""
    packs = global_batch(iteration)
    size = PACKS // groups.dp.size()
    mine = packs[groups.dp.rank() * size : (groups.dp.rank() + 1) * size]
    for start in range(0, size, micro_batch_size):
        yield join(mine[start : start + micro_batch_size])


def whole_weights(model: GMAIVL, groups: Groups) -> dict[str, Tensor]:
    """Every weight put together from the ranks; replicas must be the same to the last bit."""
    local = {
        canonical_name(model, name): parameter.detach().clone()
        for name, parameter in model.named_parameters()
    }
    ranks: list[tuple[int, int, dict[str, Tensor]]] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(ranks, (groups.tp.rank(), groups.dp.rank(), local))
    whole = {}
    for name in SeededWeights(MODEL, seed=1):
        pieces: dict[int, Tensor] = {}
        for tp_rank, _, tensors in ranks:
            if name in tensors:
                tp_rank = 0 if cut_of(name) == "none" else tp_rank
                kept = pieces.setdefault(tp_rank, tensors[name])
                assert torch.equal(kept, tensors[name]), f"copies of {name} have drifted apart"
        parts = [pieces[rank] for rank in sorted(pieces)]
        whole[name] = unshard(name, parts, MODEL.language.vocab_size)
    return whole


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
