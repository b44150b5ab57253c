"""The training loop: step, log, save, repeat."""

import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_gmai.config import Config
from megatron_gmai.data.prepare import copy_tokenizer
from megatron_gmai.planner.cost import step_flops
from megatron_gmai.planner.hardware import device_peak
from megatron_gmai.runtime.device import Device, device_name, peak_memory_bytes
from megatron_gmai.training.checkpoint import Position, save_checkpoint
from megatron_gmai.training.metrics import MetricsLog, make_row
from megatron_gmai.training.optimizer import finish_param_gather, learning_rate
from megatron_gmai.training.optimizer_state import steps_taken
from megatron_gmai.training.preemption import stop_requested
from megatron_gmai.training.setup import Run
from megatron_gmai.training.step import StepResult


def train(run: Run) -> bool:
    """Take every step from the run's position to its end, saving on the way.

    False if a stop signal has come to some rank: the run is saved and can be resumed.
    """
    config, total = run.config, run.total_iterations
    log = open_log(run)
    save_every = checkpoint_steps(config.run.checkpoint_interval, total)
    finished = True
    for iteration in range(run.position.iteration + 1, total + 1):
        began = time.monotonic()
        lr = learning_rate(iteration, total, config.train)
        result = run.step(run.batches, lr)
        if result.rejections:
            run.dataset.reject(result.rejections)
        seconds = time.monotonic() - began
        if iteration % config.run.log_interval == 0 or iteration == total:
            memory = highest_of_all_ranks(peak_memory_bytes(run.world.device), run.world.device)
            if log is not None:
                log.write(
                    make_row(iteration, result, lr, seconds, memory, *speed_terms(run, result))
                )
        # A signal reaches the ranks between different steps: all stop after the same one.
        stopped = bool(highest_of_all_ranks(int(stop_requested()), run.world.device))
        if iteration % save_every == 0 or iteration == total or stopped:
            save(run, iteration)
        if stopped and iteration < total:
            finished = False
            break
    if log is not None:
        log.close()
    return finished


def speed_terms(run: Run, result: StepResult) -> tuple[float, float | None]:
    """Model FLOPs of the step, and what all devices could do in a second, if that is known."""
    flops = step_flops(run.config, result.positions, result.tokens, result.images, result.samples)
    peak = device_peak(device_name(run.world.device))
    return flops, None if peak is None else peak * run.world.layout.world_size


def save(run: Run, iteration: int) -> None:
    """Write the checkpoint of this iteration."""
    config = run.config
    assert config.run.save is not None
    optimizer = None if config.run.checkpoint_drop_optimizer else run.optimizer
    new_packs = (iteration - run.position.iteration) * config.train.global_batch_size
    consumed = run.position.consumed_packs + new_packs
    position = Position(
        iteration,
        consumed,
        steps_taken(run.optimizer, run.world.device),
        run.dataset.bookmark(consumed),
    )
    finish_param_gather(run.chunks)
    chunks = [chunk.module for chunk in run.chunks]
    path = save_checkpoint(Path(config.run.save), position, chunks, optimizer, config, run.carried)
    if run.world.is_first_rank:
        print(f"saved {path}", flush=True)


def open_log(run: Run) -> MetricsLog | None:
    """The log on rank 0; other ranks have none."""
    if not run.world.is_first_rank:
        return None
    settings = run.config.run
    assert settings.tensorboard_dir is not None
    return MetricsLog(
        Path(settings.work_dir),
        Path(settings.tensorboard_dir),
        run.position.iteration,
        run.total_iterations,
        settings.log_interval,
    )


def checkpoint_steps(interval: float, total: int) -> int:
    """Steps between checkpoints: below 1 a share of the run, -1 only at the end."""
    if interval < 0:
        return total
    return max(1, round(interval * total)) if interval < 1 else int(interval)


def highest_of_all_ranks(value: int, device: Device) -> int:
    tensor = torch.tensor([value], dtype=torch.int64, device=device.torch_device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def save_config(config: Config) -> None:
    """Keep the effective configuration beside the run, and its tokenizer beside the checkpoints:
    with them the next phase has all it needs."""
    path = Path(config.run.work_dir) / "config.json"
    path.write_text(config.to_json(), encoding="utf-8")
    assert config.data.tokenizer is not None and config.run.save is not None
    Path(config.run.save).mkdir(parents=True, exist_ok=True)
    copy_tokenizer(config.data.tokenizer, config.run.save)
