"""Gradient buffers, AdamW and the learning rate."""

import math

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)

from megatron_gmai.config import Config, TrainConfig
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.runtime.device import Device
from megatron_gmai.runtime.groups import Groups


def wrap_for_training(model: GMAIVL, config: Config, groups: Groups) -> DistributedDataParallel:
    """Megatron's gradient buffers around the model; gradients are kept and reduced in fp32."""
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    return DistributedDataParallel(model.config, ddp_config, model, pg_collection=groups.mcore)


def build_optimizer(
    model: DistributedDataParallel, config: Config, device: Device, groups: Groups
) -> MegatronOptimizer:
    """AdamW over the trainable parameters, with fp32 masters where parameters are half precision.

    Biases and norms are not decayed (Megatron's standard rule).
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
    return get_megatron_optimizer(
        optimizer_config,
        [model],
        config_overrides=get_standard_config_overrides(optimizer_config),
        use_gloo_process_groups=False,
        pg_collection=groups.mcore,
    )


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
