"""The training loop: step, log, save, repeat."""

import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_gmai.config import Config
from megatron_gmai.layout import Layout
from megatron_gmai.observe.sinks import open_sinks
from megatron_gmai.planner.cost import Load, step_flops
from megatron_gmai.planner.hardware import Gpu, gpu_of_driver
from megatron_gmai.planner.speed import step_time
from megatron_gmai.runtime.device import Device, device_name, peak_memory_bytes
from megatron_gmai.training.checkpoint import newest_whole_checkpoint
from megatron_gmai.training.held_out import evaluate
from megatron_gmai.training.metrics import MetricsLog, make_row
from megatron_gmai.training.optimizer import finish_param_gather, learning_rate
from megatron_gmai.training.preemption import stop_requested
from megatron_gmai.training.profiling import Profiler
from megatron_gmai.training.saving import Saver
from megatron_gmai.training.setup import Run
from megatron_gmai.training.skipped import SkippedSteps
from megatron_gmai.training.spikes import LossSpikes
from megatron_gmai.training.step import StepResult
from megatron_gmai.training.timing import RankTimes, gather_times
from megatron_gmai.training.watchdog import Watchdog


def train(run: Run) -> bool:
    """Take every step from the run's position to its end, saving on the way.

    False if a stop signal has come to some rank: the run is saved and can be resumed.
    """
    settings = run.config.run
    minutes = settings.distributed_timeout_minutes
    with Watchdog(Path(settings.work_dir), minutes * 60) as watchdog:
        return take_steps(run, watchdog)


def take_steps(run: Run, watchdog: Watchdog) -> bool:
    """The loop itself; whether it came to the end."""
    config, total = run.config, run.total_iterations
    log = open_log(run)
    batches = watchdog.over(run.batches)
    save_every = checkpoint_steps(config.run.checkpoint_interval, total)
    skipped, spikes, saver = open_skipped(run), open_spikes(run), Saver(run)
    profiler = Profiler(config.run, run.world.rank)
    finished, saving = True, 0.0
    for iteration in range(run.position.iteration + 1, total + 1):
        watchdog.begin(iteration)
        profiler.begin(iteration)
        began = time.monotonic()
        lr = learning_rate(iteration, total, config.train)
        result = run.step(batches, lr, spikes.is_spike)
        if result.rejections:
            run.dataset.reject(result.rejections)
        skipped.add(iteration, result, partial(newest, run))
        spikes.add(iteration, result)
        seconds = time.monotonic() - began
        if iteration % config.run.log_interval == 0 or iteration == total:
            memory = highest_of_all_ranks(peak_memory_bytes(run.world.device), run.world.device)
            times = times_of_all_ranks(run)
            if log is not None:
                flops = speed_terms(run, result)
                row = make_row(
                    iteration, result, lr, seconds, memory, *flops, skipped.total, saving, times
                )
                log.write(row)
            saving = 0.0
        # Before the checkpoint of the same step: a run that resumes from it has this behind it.
        if run.held_out and (iteration % config.run.eval_interval == 0 or iteration == total):
            validate(run, iteration, watchdog, log)
        # A signal reaches the ranks between different steps: all stop after the same one.
        stopped = bool(highest_of_all_ranks(int(stop_requested()), run.world.device))
        if iteration % save_every == 0 or iteration == total or stopped:
            with watchdog.paused():
                saving += saver.save(iteration, must_succeed=iteration == total or stopped)
        if stopped and iteration < total:
            finished = False
            break
    profiler.finish()
    if log is not None:
        log.close()
    return finished


def times_of_all_ranks(run: Run) -> list[RankTimes]:
    assert run.step.timers is not None
    return gather_times(run.step.timers, run.world.groups, run.world.device.torch_device)


def validate(run: Run, iteration: int, watchdog: Watchdog, log: MetricsLog | None) -> None:
    """Take the loss on the held-out packs of each data set, and record it."""
    finish_param_gather(run.chunks)
    found = {
        held_out.name: evaluate(held_out, run.config, run.world, run.step, watchdog.over)
        for held_out in run.held_out
    }
    watchdog.beat()
    if log is not None:
        log.write_validation(iteration, found)


def speed_terms(run: Run, result: StepResult) -> tuple[float, float | None, float | None]:
    """Model FLOPs of the step; where the planner knows the devices, what all of them could do in a
    second, and the seconds that it predicts for the step."""
    flops = step_flops(run.config, result.tokens, result.images, result.samples)
    gpu, layout = gpu_of_driver(device_name(run.world.device)), run.world.layout
    if gpu is None:
        return flops, None, None
    return flops, gpu.peak_flops * layout.world_size, predicted(run.config, layout, result, gpu)


def predicted(config: Config, layout: Layout, result: StepResult, gpu: Gpu) -> float:
    """Seconds that the planner gives a step with so many samples and images."""
    packs = config.train.global_batch_size
    load = Load(config.data.max_length, max(1.0, result.samples / packs), result.images / packs)
    return step_time(config, layout, load, gpu).seconds


def newest(run: Run) -> Path | None:
    """The newest whole checkpoint of this run."""
    assert run.config.run.save is not None
    checkpoint, _ = newest_whole_checkpoint(Path(run.config.run.save))
    return None if checkpoint is None else checkpoint.path


def open_skipped(run: Run) -> SkippedSteps:
    work_dir = Path(run.config.run.work_dir) if run.world.is_first_rank else None
    return SkippedSteps(work_dir, run.position.iteration, run.config.run.max_skipped_steps)


def open_spikes(run: Run) -> LossSpikes:
    work_dir = Path(run.config.run.work_dir) if run.world.is_first_rank else None
    return LossSpikes(work_dir, run.position.iteration)


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
        open_sinks(run.config, run.world.layout.world_size),
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
