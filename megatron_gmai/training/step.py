"""One optimizer step: micro-batches through the pipeline, gradients finished, weights updated."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_gmai.data.ledger import Rejection
from megatron_gmai.data.loading.batch import MicroBatch
from megatron_gmai.model.attention import Segments
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.runtime.device import Device
from megatron_gmai.runtime.groups import Groups

IGNORED = -100


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
    updated: bool  # False if fp16 overflowed and the step was skipped
    rejected: int = 0  # places of samples that could not be read
    rejections: tuple[Rejection, ...] = ()  # and why


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
        self.supervised_tokens += int((batch.labels != IGNORED).sum())
        self.tokens += batch.num_tokens
        self.positions += batch.tokens.numel()
        self.images += batch.image_starts.numel()
        self.samples += batch.num_samples
        self.rejected += len(batch.rejections)


class TrainStep:
    """Runs steps on a wrapped model; owns nothing but references."""

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        device: Device,
        groups: Groups,
        num_microbatches: int,
        tokens_per_microbatch: int,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.device, self.groups = device, groups
        self.num_microbatches = num_microbatches
        self.tokens_per_microbatch = tokens_per_microbatch
        self.forward_backward = get_forward_backward_func()
        config = model.module.config
        config.finalize_model_grads_func = partial(finalize_gradients, groups=groups)
        config.grad_scale_func = optimizer.scale_loss
        if model.ddp_config.overlap_grad_reduce:
            config.no_sync_func = model.no_sync
        if model.ddp_config.overlap_param_gather:
            config.param_sync_func = model.start_param_sync

    def __call__(self, batches: Iterator[MicroBatch], lr: float) -> StepResult:
        """One step over this rank's next `num_microbatches` micro-batches."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        counts, found = _Counts(), list[Rejection]()
        losses = self.forward_backward(
            forward_step_func=partial(forward_step, device=self.device, counts=counts, found=found),
            data_iterator=batches,
            model=self.model,
            num_microbatches=self.num_microbatches,
            seq_length=self.tokens_per_microbatch,
            micro_batch_size=1,  # the packs of a micro-batch are one sequence to Megatron
            forward_only=False,
        )
        updated, grad_norm, _ = self.optimizer.step()
        counts.loss = float(sum(losses)) if self.groups.is_last_stage else 0.0
        total = reduce_counts(counts, self.groups, self.device)
        return StepResult(
            loss=total["loss"] / max(1, total["supervised_tokens"]),
            grad_norm=float(grad_norm or 0.0),
            updated=bool(updated),
            rejections=gather(found, self.groups) if total["rejected"] else (),
            **{f.name: int(total[f.name]) for f in fields(_Counts) if f.name != "loss"},
        )


def forward_step(
    batches: Iterator[MicroBatch],
    model: torch.nn.Module,
    device: Device,
    counts: _Counts,
    found: list[Rejection],
) -> tuple[Tensor, Any]:
    """Megatron's forward step: the stage's output and the function that sums its losses."""
    batch = next(batches)
    counts.add(batch)
    found += batch.rejections
    to_device = partial(torch.Tensor.to, device=device.torch_device, non_blocking=True)
    output = model(
        tokens=to_device(batch.tokens),
        position_ids=to_device(batch.position_ids),
        segments=Segments.from_cu_seqlens(batch.cu_seqlens, batch.max_seqlen, device.torch_device),
        labels=batch.labels,  # in host memory: the loss checks and sorts them without a wait
        pixel_values=to_device(batch.pixel_values),
        image_starts=to_device(batch.image_starts),
    )
    return output, partial(sum_losses, labels=to_device(batch.labels))


def sum_losses(losses: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 [T] -> (sum to differentiate, supervised tokens, the same sum in fp64 to report)."""
    supervised = (labels != IGNORED).sum(dtype=torch.int)
    return losses.sum(), supervised, losses.detach().double().sum()


def finalize_gradients(
    model: list[DistributedDataParallel], *args: Any, groups: Groups, **kwargs: Any
) -> None:
    """Megatron's reductions, then the vision gradients' sum over the tensor-parallel ranks.

    Each of those ranks encoded other images of the same micro-batch, so its tower and projector
    hold one part of the gradient; the language model's gradient is whole already.
    """
    finalize_model_grads(model, *args, **kwargs)
    if groups.tp.size() == 1:
        return
    for chunk in model:
        gmai_vl = chunk.module
        assert isinstance(gmai_vl, GMAIVL)
        gradients: list[Tensor] = [
            getattr(p, "main_grad")  # noqa: B009  (set by Megatron, unknown to the type)
            for _, p in gmai_vl.vision_parameters()
            if p.requires_grad
        ]
        if not gradients:
            continue
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat, group=groups.tp)
        for gradient, piece in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(piece.view_as(gradient))


def reduce_counts(counts: _Counts, groups: Groups, device: Device) -> dict[str, float]:
    """Sum over the data-parallel ranks; the loss, known to the last stage only, goes to all."""
    names = [f.name for f in fields(_Counts)]
    values = torch.tensor(
        [getattr(counts, name) for name in names], dtype=torch.float64, device=device.torch_device
    )
    dist.all_reduce(values, group=groups.dp_cp)
    if groups.pp.size() > 1:
        last = dist.get_global_rank(groups.pp, groups.pp.size() - 1)
        dist.broadcast(values, src=last, group=groups.pp)
    return dict(zip(names, values.tolist(), strict=True))


def gather(found: list[Rejection], groups: Groups) -> tuple[Rejection, ...]:
    """What all data-parallel ranks have found. It costs a step some time, in the rare case only."""
    lists: list[Any] = [None] * groups.dp_cp.size()
    dist.all_gather_object(lists, found, group=groups.dp_cp)
    return tuple(rejection for part in lists for rejection in part)
