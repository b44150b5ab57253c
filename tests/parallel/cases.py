"""One parity case: a layout, a training phase, and what its steps gave."""

import dataclasses
import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from megatron_gmai.config import Config, LoraConfig, ModelConfig, ParallelConfig
from megatron_gmai.convert.seeded import SeededWeights
from megatron_gmai.convert.sharding import unshard
from megatron_gmai.data.loading.batch import MicroBatch
from megatron_gmai.model.attention import Segments
from megatron_gmai.model.gmai_vl import GMAIVL, build_chunks
from megatron_gmai.model.transformer import pipeline_transfers
from megatron_gmai.model.vision_parallel import own_gradient
from megatron_gmai.runtime import cpu
from megatron_gmai.runtime.device import DTYPES, Device, choose_device
from megatron_gmai.runtime.groups import (
    Groups,
    destroy_groups,
    initialize_distributed,
)
from megatron_gmai.runtime.world import World, lay_out
from megatron_gmai.training.encode_ahead import EncodedStep
from megatron_gmai.training.optimizer import (
    build_optimizer,
    finish_param_gather,
    wrap_for_training,
)
from megatron_gmai.training.step import StepResult, TrainStep
from megatron_gmai.training.weights import fill, named_weights
from tests.parallel.batches import CONFIG, LENGTH, MODEL, PACKS, global_batch, join

STEPS = 4
PHASES: dict[int, dict[str, Any]] = {
    1: {"freeze_vit": True, "freeze_llm": True},
    2: {"freeze_llm": True},
    3: {},
}


@dataclass(frozen=True)
class Case:
    """A layout (of the world it is run in) and a phase; `fault` plants a bug on purpose."""

    name: str
    parallel: ParallelConfig = ParallelConfig()
    phase: int = 3
    micro_batch_size: int = 1
    train: tuple[tuple[str, Any], ...] = ()  # further settings
    lora: LoraConfig = LoraConfig()
    fault: str = "none"
    dtype: str = "fp32"
    gpu_transfers: bool = False  # between pipeline stages, as on GPUs
    tied: bool = False  # the output layer is the embedding

    @property
    def model(self) -> ModelConfig:
        language = dataclasses.replace(MODEL.language, tie_word_embeddings=self.tied)
        return dataclasses.replace(MODEL, language=language)

    @property
    def config(self) -> Config:
        train = dataclasses.replace(
            CONFIG.train,
            micro_batch_size=self.micro_batch_size,
            **PHASES[self.phase],
            **dict(self.train),
        )
        return dataclasses.replace(
            CONFIG, model=self.model, parallel=self.parallel, train=train, lora=self.lora
        )


@dataclass
class Outcome:
    """What the steps of one case gave, the same on every rank."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)  # whole, by canonical name
    drifted: list[str] = field(default_factory=list)  # weights whose copies differ between ranks
    encoded: list[int] = field(default_factory=list)  # what identifies the images, over all ranks


class Processes:
    """The processes of this world, joined once; the groups are built anew for each case."""

    def __init__(self) -> None:
        with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "64"}):  # one thread
            self.device: Device = choose_device("cpu", "fp32")
        gc.freeze()  # collecting need not look at all that was imported
        initialize_distributed(self.device, timeout_minutes=1)

    def world(self, config: Config, dtype: str = "fp32") -> World:
        """The world of this layout."""
        self._leave_groups()
        return lay_out(dataclasses.replace(self.device, dtype=DTYPES[dtype]), config)

    def _leave_groups(self) -> None:
        """End the groups of the layout before: each keeps a thread and its sockets, which spin once
        another process has ended."""
        parallel_state.destroy_model_parallel()
        dist.barrier()
        for group in [*dist.distributed_c10d._world.pg_map]:
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        gc.collect()  # the models of the layout before hold them, in cycles

    def model(self, config: Config, source: Mapping[str, Tensor] | None = None) -> GMAIVL:
        """The model of a layout that holds it in one chunk a rank, with the weights of `source`."""
        (chunk,) = build_chunks(config, self.world(config))
        fill([chunk], source or SeededWeights(config.model, seed=1))
        return chunk

    def close(self) -> None:
        """Leave the world and give torch its own functions back."""
        gc.unfreeze()
        destroy_groups()
        cpu.uninstall()


def run_cases(cases: list[Case], folder: Path) -> None:
    """Run each case in this world and write its outcome to `folder/NAME.pt`."""
    processes = Processes()
    for case in cases:
        outcome = run_case(case, processes)
        if dist.get_rank() == 0:
            torch.save(vars(outcome), folder / f"{case.name}.pt")
    dist.barrier()


def run_case(case: Case, processes: Processes) -> Outcome:
    with planted(case.fault), transfers(case.gpu_transfers):
        trainer = Trainer(case, processes)
        outcome = Outcome()
        if trainer.world.image_share is not None:
            count_images(trainer.chunks[0], outcome.encoded)
        for iteration in range(STEPS):
            result = trainer.step(iteration)
            outcome.losses.append(result.loss)
            outcome.grad_norms.append(result.grad_norm)
    finish_param_gather(trainer.wrapped)
    outcome.weights, outcome.drifted = whole_weights(trainer.chunks, trainer.world.groups)
    everywhere: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, outcome.encoded)
    outcome.encoded = sorted(number for numbers in everywhere for number in numbers)
    trainer.close()
    return outcome


class Trainer:
    """A model of this case's layout with its optimizer, from the same start weights every time."""

    def __init__(self, case: Case, processes: Processes) -> None:
        self.case, self.config = case, case.config
        self.world = processes.world(self.config, case.dtype)
        self.chunks = build_chunks(self.config, self.world)
        fill(self.chunks, SeededWeights(case.model, seed=1))
        if case.lora.towers:
            fill(self.chunks, started_adapters(case.lora), adapters=True)
        self.wrapped = wrap_for_training(self.chunks, self.config, self.world.groups)
        self.optimizer = build_optimizer(
            self.wrapped, self.config, self.world.device, self.world.groups
        )
        self.optimizer.reload_model_params()
        self._step = TrainStep(
            self.wrapped,
            self.optimizer,
            self.world,
            self.world.layout.micro_batches(self.config.train),
            LENGTH * case.micro_batch_size,
        )

    def step(self, iteration: int) -> StepResult:
        batches = share(iteration, self.case.micro_batch_size, self.world.groups)
        return self._step(batches, self.config.train.lr)

    def close(self) -> None:
        """Break cycles through hooks and views of tensors, which Python's collector does not see:
        they would keep the groups alive, whose threads slow down all later cases."""
        for chunk in self.wrapped:
            vars(chunk).clear()


def started_adapters(lora: LoraConfig) -> dict[str, Tensor]:
    """Adapters in the middle of training: A is not alone in having an effect."""
    seeded = SeededWeights(MODEL, seed=1, lora=lora)
    generator = torch.Generator().manual_seed(7)
    return {
        name: 0.1 * torch.randn(weight.shape, generator=generator)
        if name.endswith(".b")
        else seeded[name]
        for name, weight in seeded.table.items()
        if weight.is_adapter
    }


def count_images(chunk: GMAIVL, encoded: list[int]) -> None:
    """Note what this rank is given to encode (recomputation may run the tower once more)."""
    encode = chunk._project_features

    def counting(pixels: Tensor) -> Tensor:
        encoded.extend(identify(pixels))
        return encode(pixels)

    chunk._project_features = counting  # type: ignore[method-assign]


def identify(pixels: Tensor) -> list[int]:
    """A number for each image that is not blank."""
    sums = (pixels.flatten(1).long() * torch.arange(1, pixels[0].numel() + 1)).sum(1)
    return [number for number in sums.tolist() if number]


def share(iteration: int, micro_batch_size: int, groups: Groups) -> Iterator[MicroBatch]:
    """This data-parallel rank's micro-batches of a step."""
    packs = global_batch(iteration)
    size = PACKS // groups.dp.size()
    mine = packs[groups.dp.rank() * size : (groups.dp.rank() + 1) * size]
    images = 0
    for start in range(0, size, micro_batch_size):
        batch = join(mine[start : start + micro_batch_size])
        yield dataclasses.replace(batch, first_image=images)
        images += len(batch.image_starts)


def whole_weights(chunks: list[GMAIVL], groups: Groups) -> tuple[dict[str, Tensor], list[str]]:
    """Every weight put together from the ranks, and the names whose copies are not identical."""
    local = {weight.name: parameter.detach().clone() for weight, parameter in named_weights(chunks)}
    ranks: list[tuple[int, dict[str, Tensor]]] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(ranks, (groups.tp.rank(), local))
    whole, drifted = {}, []
    for name, weight in chunks[0].table.items():
        pieces: dict[int, Tensor] = {}
        for tp_rank, tensors in ranks:
            if name in tensors:
                kept = pieces.setdefault(0 if weight.cut == "none" else tp_rank, tensors[name])
                if not torch.equal(kept, tensors[name]):
                    drifted.append(name)
        whole[name] = unshard(weight, [pieces[rank] for rank in sorted(pieces)])
    return whole, drifted


def transfers(as_on_gpus: bool) -> AbstractContextManager[Any]:
    """Overlap and freeing of outputs as on GPUs; gloo cannot batch messages, but knows these."""
    if not as_on_gpus:
        return nullcontext()

    def chosen(on_gpu: bool, interleaved: bool) -> dict[str, bool]:
        return pipeline_transfers(True, interleaved) | {"batch_p2p_comm": False}

    return mock.patch("megatron_gmai.model.transformer.pipeline_transfers", chosen)


def planted(fault: str) -> AbstractContextManager[Any]:
    """A mistake of the kind that the comparison has to reveal."""
    if fault == "none":
        return nullcontext()
    if fault == "vision gradients not summed over TP":
        # Reduced with the language model's, over DP only.
        return mock.patch.object(GMAIVL, "_mark_vision_parameters")
    if fault == "vision gradients not summed over CP":

        def part(gradient: Tensor, groups: Groups) -> Tensor:
            by_rank = gradient.view(groups.images.size(), -1, *gradient.shape[1:])
            return by_rank[groups.images.rank()].contiguous()

        return mock.patch("megatron_gmai.model.vision_parallel.own_gradient", part)
    if fault == "mean of the micro-batches' means":

        def mean(losses: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            count = (labels != -100).sum()
            loss = losses.sum() / count
            one = torch.ones((), dtype=torch.int)
            return loss, one, (losses.detach().double().sum())

        return mock.patch("megatron_gmai.training.step.sum_losses", mean)
    if fault == "segment boundaries off by one":
        exact = Segments.from_cu_seqlens

        def shifted(cu_seqlens: Tensor, *rest: Any) -> Segments:
            moved = cu_seqlens.clone()
            moved[1:-1] += 1
            return exact(moved, *rest)

        return mock.patch.object(Segments, "from_cu_seqlens", shifted)
    if fault == "the gather of updated weights is not awaited":
        return mock.patch.object(DistributedDataParallel, "enable_forward_pre_hook")
    if fault == "vision gradients counted once per TP rank":

        def summed(gradient: Tensor, groups: Groups) -> Tensor:
            dist.all_reduce(gradient, group=groups.tp)
            return own_gradient(gradient, groups)

        return mock.patch("megatron_gmai.model.vision_parallel.own_gradient", summed)
    if fault.startswith("feature gradients"):
        exact_gradients = EncodedStep._gradients_by_rank

        def wrong(self: EncodedStep) -> list[Tensor]:
            first, *others = exact_gradients(self)
            if fault == "feature gradients applied twice":
                return [2 * gradient for gradient in (first, *others)]
            return [first, *(torch.zeros_like(gradient) for gradient in others)]

        return mock.patch.object(EncodedStep, "_gradients_by_rank", wrong)
    if fault == "gradients of a tied weight not summed over its copies":
        finalize = sys.modules[finalize_model_grads.__module__]
        return mock.patch.object(finalize, "_allreduce_word_embedding_grads")
    if fault == "copies of the tower counted in the norm":
        return mock.patch("megatron.core.optimizer.optimizer.param_is_not_shared", lambda p: True)
    raise AssertionError(fault)
