"""Gradient buffers, AdamW and the learning rate."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_gmai.config import Config, TrainConfig
from megatron_gmai.layout import encodes_ahead
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.runtime.device import Device
from megatron_gmai.runtime.groups import Groups


def wrap_for_training(
    chunks: Sequence[GMAIVL], config: Config, groups: Groups
) -> list[DistributedDataParallel]:
    """Megatron's gradient buffers around each chunk; gradients are kept and reduced in fp32."""
    parallel = config.parallel
    mcore = groups.mcore
    if encodes_ahead(parallel):
        # Megatron cuts buckets on the first pipeline stage only; the tower's copies are on all
        # stages, so their buckets have to be the same everywhere.
        mcore = copy.copy(mcore)
        mcore.pp = groups.solo
    wrapped = []
    for index, chunk in enumerate(chunks):
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            bucket_size=parallel.ddp_bucket_size,
        )
        wrapped.append(
            DistributedDataParallel(
                chunk.config,
                ddp_config,
                chunk,
                # Reduction of later chunks hides behind the backward passes of earlier ones.
                disable_bucketing=index > 0,
                pg_collection=mcore,
            )
        )
    return wrapped


def finish_param_gather(chunks: Sequence[DistributedDataParallel]) -> None:
    """Make the weights whole: call this before anything but a forward pass reads them.

    With `--overlap-param-gather` an optimizer step updates each data-parallel rank's part only; the
    other parts arrive during the next forward pass, so until then the weights are stale.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], config: Config, device: Device, groups: Groups
) -> MegatronOptimizer:
    """AdamW over the trainable parameters, with fp32 masters where parameters are half precision.

    Biases and norms are not decayed (Megatron's standard rule). The language model and the vision
    tower have an optimizer each, since their state is sharded over different ranks.
    """
    train, parallel = config.train, config.parallel
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.wd,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.max_grad_norm,
        bf16=device.dtype is torch.bfloat16,
        fp16=device.dtype is torch.float16,
        params_dtype=device.dtype,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(
        optimizer_config,
        list(chunks),
        config_overrides=get_standard_config_overrides(optimizer_config),
        use_gloo_process_groups=False,
        pg_collection=groups.mcore,
    )
    # Megatron's scheduler, which is not used here, would multiply these.
    for group in optimizer.param_groups:
        group["weight_decay"] = train.wd * group["wd_mult"]
        # For torch's AdamW, which loops over tensors on a CPU otherwise and on a GPU takes a square
        # root of all second moments at once. Transformer Engine's and Apex's are always fused.
        group["fused"] = True
    return optimizer


@dataclass(frozen=True)
class Update:
    """What became of a step's gradients; equal on every rank."""

    applied: bool
    grad_norm: float  # before clipping
    not_finite: str = ""  # why they were not applied; empty where fp16's scaler dropped them


@torch.no_grad()
def apply_gradients(optimizer: MegatronOptimizer, loss: float) -> Update:
    """Clip the reduced gradients and step, unless the loss or the gradients' norm is not finite.

    These are the parts of Megatron's own `step`, whose fp32 and bf16 optimizers would write a NaN
    into every weight. `loss` and the norm are sums over all ranks, so all decide alike.
    """
    overflowed = optimizer.prepare_grads()  # also lets fp16's loss scale follow
    norm = math.nan if overflowed else float(optimizer.get_grad_norm() or 0.0)
    if not math.isfinite(loss):
        return Update(False, norm, f"the loss is {loss}")
    if overflowed:
        return Update(False, 0.0)
    if not math.isfinite(norm):
        return Update(False, norm, f"the gradient's norm is {norm}")
    is_chain = isinstance(optimizer, ChainedOptimizer)
    for inner in optimizer.chained_optimizers if is_chain else [optimizer]:
        parameters = inner.get_parameters()
        if parameters and inner.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, inner.config.clip_grad, norm)
    return Update(bool(optimizer.step_with_ready_grads()), norm)


def learning_rate(iteration: int, total: int, train: TrainConfig) -> float:
    """Rate of optimizer step `iteration` (from 1): linear warm-up from 0, then cosine to `min_lr`.

    Neither end of the ramps is a step of its own: the first step already moves the weights, and
    the last one still does.
    """
    warmup = round(train.warmup_ratio * total)
    if iteration <= warmup:
        return train.lr * iteration / (warmup + 1)
    progress = (iteration - 1 - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return train.min_lr + (train.lr - train.min_lr) * cosine
