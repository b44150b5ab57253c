"""One optimizer step: micro-batches through the pipeline, gradients finished, weights updated."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_gmai.config import IGNORE_INDEX
from megatron_gmai.data.ledger import Rejection
from megatron_gmai.data.loading.batch import MicroBatch
from megatron_gmai.model.attention import Segments
from megatron_gmai.runtime.groups import Groups
from megatron_gmai.runtime.world import World
from megatron_gmai.training.encode_ahead import EncodedStep, encode_step
from megatron_gmai.training.optimizer import apply_gradients
from megatron_gmai.training.out_of_memory import out_of_memory
from megatron_gmai.training.timing import StepTimers

_MULTIPLE = 16  # tokens of a rank: what matrix products in FP8 ask for
Item = TypeVar("Item")
Input = tuple[MicroBatch, Tensor | None]  # with the features of its images, if encoded ahead


@dataclass(frozen=True)
class StepResult:
    """What one step did, over the global batch; equal on every rank."""

    loss: float  # mean over the supervised tokens of the global batch
    grad_norm: float
    supervised_tokens: int
    tokens: int  # without padding
    positions: int  # with padding
    images: int
    samples: int
    updated: bool  # False if fp16 overflowed, or `not_finite` tells why
    rejected: int = 0  # places of samples that could not be read
    rejections: tuple[Rejection, ...] = ()  # and why
    not_finite: str = ""  # what kept the gradients from being applied
    keys: tuple[str, ...] = ()  # of the global batch's samples, if `not_finite` or a spike


@dataclass(frozen=True)
class Evaluated:
    """What a pass over held-out packs gave; equal on every rank."""

    loss: float  # mean over their supervised tokens
    supervised_tokens: int
    samples: int
    rejected: int  # places of samples that could not be read


@dataclass
class _Counts:
    """Sums over this rank's micro-batches."""

    loss: float = 0.0
    supervised_tokens: int = 0
    tokens: int = 0
    positions: int = 0
    images: int = 0
    samples: int = 0
    rejected: int = 0

    def add(self, batch: MicroBatch) -> None:
        self.supervised_tokens += int((batch.labels != IGNORE_INDEX).sum())
        self.tokens += batch.num_tokens
        self.positions += batch.tokens.numel()
        self.images += batch.image_starts.numel()
        self.samples += batch.num_samples
        self.rejected += len(batch.rejections)


@dataclass
class _Taken:
    """What is known of the micro-batches that a step has drawn so far."""

    rejections: list[Rejection] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    newest: MicroBatch | None = None

    def over(
        self, batches: Iterator[MicroBatch], counts: _Counts, whole: bool
    ) -> Iterator[MicroBatch]:
        """Passes micro-batches on; adds them up where `whole`: context-parallel ranks share one."""
        for batch in batches:
            self.newest = batch
            if whole:
                counts.add(batch)
                self.rejections += batch.rejections
                self.keys += batch.keys
            yield batch


class TrainStep:
    """Runs steps on wrapped chunks; owns nothing but references."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        world: World,
        num_microbatches: int,
        tokens_per_microbatch: int,
        timers: StepTimers | None = None,
    ) -> None:
        self.chunks, self.optimizer, self.world = list(chunks), optimizer, world
        self.num_microbatches = num_microbatches
        self.tokens_per_microbatch = tokens_per_microbatch
        self.timers = timers
        self.forward_backward = get_forward_backward_func()
        # Megatron's schedules read these from the first chunk's configuration.
        config = self.chunks[0].module.config
        self.config, self.reduce_gradients = config, finalize_model_grads
        config.grad_scale_func = optimizer.scale_loss
        config.timers = timers
        if self.chunks[0].ddp_config.overlap_grad_reduce:
            # Gradients are reduced behind the backward pass of the last micro-batch only.
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def __call__(
        self,
        batches: Iterator[MicroBatch],
        lr: float,
        is_spike: Callable[[float], bool] = lambda loss: False,
    ) -> StepResult:
        """One step over this rank's next `num_microbatches` micro-batches. The samples of a loss
        that `is_spike`, which has to be the same on all ranks, are named."""
        if self.timers is not None:
            batches = self.timers.begin().over(batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        taken, counts = self._run(batches, self.num_microbatches, forward_only=False)
        total = reduce_counts(counts, self.world)
        loss = total["loss"] / max(1, total["supervised_tokens"])
        update = apply_gradients(self.optimizer, loss)
        return StepResult(
            loss=loss,
            grad_norm=update.grad_norm,
            updated=update.applied,
            rejections=gather(taken.rejections, self.world.groups) if total["rejected"] else (),
            not_finite=update.not_finite,
            keys=gather(taken.keys, self.world.groups)
            if update.not_finite or is_spike(loss)
            else (),
            **{f.name: int(total[f.name]) for f in fields(_Counts) if f.name != "loss"},
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterator[MicroBatch], num_microbatches: int) -> Evaluated:
        """The loss of this rank's next micro-batches; the weights must be whole
        (`finish_param_gather`). Neither gradients nor random numbers change."""
        for chunk in self.chunks:
            chunk.eval()
        try:
            _, counts = self._run(batches, num_microbatches, forward_only=True)
        finally:
            for chunk in self.chunks:
                chunk.train()
        total = reduce_counts(counts, self.world)
        return Evaluated(
            loss=total["loss"] / max(1, total["supervised_tokens"]),
            supervised_tokens=int(total["supervised_tokens"]),
            samples=int(total["samples"]),
            rejected=int(total["rejected"]),
        )

    def _run(
        self, batches: Iterator[MicroBatch], num_microbatches: int, forward_only: bool
    ) -> tuple[_Taken, _Counts]:
        """Micro-batches through the pipeline: what was drawn, and the sums of this rank."""
        taken, counts = _Taken(), _Counts()
        drawn = taken.over(batches, counts, whole=self.world.groups.cp.rank() == 0)
        try:
            losses = self._run_schedule(drawn, num_microbatches, forward_only)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(taken.newest, self.world.rank, error) from error
        counts.loss = float(sum(losses)) if self.world.holds_last_chunk else 0.0
        return taken, counts

    def _run_schedule(
        self, drawn: Iterator[MicroBatch], num_microbatches: int, forward_only: bool
    ) -> list[Tensor]:
        """Forward and backward passes of the micro-batches, and the reduction of gradients; the
        summed losses of each, on ranks of the last stage."""
        inputs, encoded = self.inputs(drawn, num_microbatches)
        self.config.finalize_model_grads_func = partial(self._finish_gradients, encoded)
        losses = self.forward_backward(
            forward_step_func=partial(forward_step, world=self.world),
            # Every chunk asks for each micro-batch once; it is drawn and counted once for all.
            data_iterator=list(itertools.tee(inputs, len(self.chunks))),
            model=self.chunks,
            num_microbatches=num_microbatches,
            seq_length=self.tokens_per_microbatch,
            micro_batch_size=1,  # the packs of a micro-batch are one sequence to Megatron
            forward_only=forward_only,
        )
        self.config.finalize_model_grads_func = None  # it would keep the features in memory
        return losses

    def inputs(
        self, drawn: Iterator[MicroBatch], num_microbatches: int
    ) -> tuple[Iterator[Input], EncodedStep | None]:
        """The step's micro-batches, each with the features that were encoded ahead, if they are."""
        if not self.world.encodes_ahead:
            return ((batch, None) for batch in drawn), None
        own = itertools.islice(drawn, num_microbatches)
        batches, encoded = encode_step(self.chunks[0].module, own, self.world)
        return zip(batches, encoded.leaves, strict=True), encoded

    def _finish_gradients(self, encoded: EncodedStep | None, *args: Any, **kwargs: Any) -> None:
        """Called by Megatron's schedules when all micro-batches have gone both ways."""
        if encoded is not None:
            encoded.backward()
        self.reduce_gradients(*args, **kwargs)


def forward_step(
    inputs: Iterator[Input], model: torch.nn.Module, world: World
) -> tuple[Tensor, Any]:
    """Megatron's forward step: a chunk's output and the function that sums its losses."""
    batch, features = next(inputs)
    if world.groups.pp.size() == world.groups.cp.size() == 1:
        # Stages agree on the size of what they send before they see a batch, and so do CP ranks.
        batch = batch.without_tail(_MULTIPLE * world.groups.tp.size())
    device, own = world.device.torch_device, world.groups.own_tokens(batch.tokens.numel())
    to_device = partial(torch.Tensor.to, device=device, non_blocking=True)
    labels = batch.labels[own]
    output = model(
        tokens=to_device(batch.tokens[own]),
        position_ids=to_device(batch.position_ids[own]),
        segments=Segments.from_cu_seqlens(batch.cu_seqlens, batch.max_seqlen, device),
        labels=labels,  # in host memory: the loss checks and sorts them without a wait
        pixel_values=to_device(batch.pixel_values),
        # Subtracted there: a new tensor here would not be pinned, and its copy would wait.
        image_starts=to_device(batch.image_starts) - own.start,
        first_image=batch.first_image,
        features=features,
    )
    return output, partial(sum_losses, labels=to_device(labels))


def sum_losses(losses: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 [T] -> (sum to differentiate, supervised tokens, the same sum in fp64 to report)."""
    supervised = (labels != IGNORE_INDEX).sum(dtype=torch.int)
    return losses.sum(), supervised, losses.detach().double().sum()


def reduce_counts(counts: _Counts, world: World) -> dict[str, float]:
    """Sum over the data-parallel ranks; the loss, known to the last stage only, goes to all."""
    names, groups = [f.name for f in fields(_Counts)], world.groups
    values = torch.tensor(
        [getattr(counts, name) for name in names],
        dtype=torch.float64,
        device=world.device.torch_device,
    )
    dist.all_reduce(values, group=groups.dp_cp)
    if groups.pp.size() > 1:
        last = dist.get_global_rank(groups.pp, groups.pp.size() - 1)
        dist.broadcast(values, src=last, group=groups.pp)
    return dict(zip(names, values.tolist(), strict=True))


def gather(found: list[Item], groups: Groups) -> tuple[Item, ...]:
    """What all data-parallel ranks have found. It costs a step some time, in the rare case only."""
    lists: list[Any] = [None] * groups.dp_cp.size()
    dist.all_gather_object(lists, found, group=groups.dp_cp)
    return tuple(item for part in lists for item in part)
