"""What a run tells: a progress line, JSON lines, TensorBoard."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_gmai.data.files import Lines, write_atomically
from megatron_gmai.observe.sinks import Sinks
from megatron_gmai.training.step import Evaluated, StepResult
from megatron_gmai.training.timing import RankTimes, by_stage, stragglers
from megatron_gmai.training.watchdog import spans

VALID_FILE = "valid.jsonl"


@dataclass(frozen=True)
class Row:
    """One line of `metrics.jsonl`; the field names are its keys."""

    iteration: int
    loss: float
    lr: float
    grad_norm: float
    supervised_tokens: int
    tokens: int
    images: int
    samples: int
    pack_fill: float
    step_time_s: float
    tokens_per_s: float
    peak_memory_bytes: int
    skipped_steps: int = 0  # so far: neither loss nor gradient may be infinite or NaN
    save_time_s: float = 0.0  # that checkpoints held up training, since the row before
    model_flops_per_s: float = 0.0  # of all ranks, the vision tower's included
    mfu: float | None = None  # share of the devices' peak; None where that is not known
    data_wait_s: float = 0.0  # of the rank that waited longest for its micro-batches
    # Of each pipeline stage, seconds: `compute`, `pipeline` (other stages: transfers and bubble),
    # `reduce` (gradients), `data`.
    stages: list[dict[str, float]] = field(default_factory=list)
    stragglers: list[int] = field(default_factory=list)  # ranks that took far longer than others
    predicted_step_time_s: float | None = None  # the planner's; None where it does not know them


def make_row(
    iteration: int,
    result: StepResult,
    lr: float,
    seconds: float,
    memory: int,
    flops: float = 0.0,
    peak: float | None = None,
    predicted: float | None = None,
    skipped: int = 0,
    saving: float = 0.0,
    times: Sequence[RankTimes] = (),
) -> Row:
    """`flops` of the step's model work and `peak` a second, both of all ranks; `predicted` seconds
    of the step; `times` of each rank."""
    return Row(
        iteration=iteration,
        loss=result.loss,
        lr=lr,
        grad_norm=result.grad_norm,
        supervised_tokens=result.supervised_tokens,
        tokens=result.tokens,
        images=result.images,
        samples=result.samples,
        pack_fill=result.tokens / max(1, result.positions),
        step_time_s=seconds,
        tokens_per_s=result.tokens / seconds,
        peak_memory_bytes=memory,
        model_flops_per_s=flops / seconds,
        mfu=None if peak is None else flops / seconds / peak,
        predicted_step_time_s=predicted,
        skipped_steps=skipped,
        save_time_s=saving,
        data_wait_s=max((one.data for one in times), default=0.0),
        stages=by_stage(times),
        stragglers=stragglers(times),
    )


class MetricsLog:
    """Writes rows to `WORK_DIR/metrics.jsonl` and TensorBoard, and lines to the terminal.

    Used on one rank. Rows past `start` are dropped on opening: a resumed run repeats the steps
    since its checkpoint, and each step must stand in the file once.
    """

    def __init__(
        self,
        work_dir: Path,
        tensorboard_dir: Path,
        start: int,
        total: int,
        interval: int,
        sinks: Sinks | None = None,
    ) -> None:
        path, valid = work_dir / "metrics.jsonl", work_dir / VALID_FILE
        for written in (path, valid):
            keep_rows_up_to(written, start)
        self.rows, self.valid = Lines(path), Lines(valid)
        self.events, self.sinks = Events(tensorboard_dir, start), sinks or Sinks([])
        self.start, self.total, self.interval = start, total, interval
        self.began = time.monotonic()

    def write(self, row: Row) -> None:
        """Record a step; every `interval` steps, and after the last, print a line."""
        if row.iteration % self.interval and row.iteration != self.total:
            return
        self.rows.add([json.dumps(vars(row)) + "\n"])
        names = ("loss", "lr", "grad_norm", "tokens_per_s", "pack_fill")
        self.events.add({name: getattr(row, name) for name in names}, row.iteration)
        numbers = {name: v for name, v in vars(row).items() if isinstance(v, int | float)}
        self.sinks.log(numbers, row.iteration)
        print(self.line(row), flush=True)

    def write_validation(self, iteration: int, found: Mapping[str, Evaluated]) -> None:
        """Record the validation losses of the data sets: a line each in `WORK_DIR/valid.jsonl`."""
        rows = [{"iteration": iteration, "data_set": n, **vars(r)} for n, r in found.items()]
        self.valid.add(json.dumps(row) + "\n" for row in rows)
        losses = {f"valid_loss/{name}": result.loss for name, result in found.items()}
        self.events.add(losses, iteration)
        self.sinks.log(losses, iteration)
        text = ", ".join(f"{name} {result.loss:.4f}" for name, result in found.items())
        print(f"validation at step {iteration}: {text}", flush=True)

    def line(self, row: Row) -> str:
        done = row.iteration - self.start
        left = (time.monotonic() - self.began) / done * (self.total - row.iteration)
        return (
            f"step {row.iteration}/{self.total}"
            f" | loss {row.loss:.4f} | lr {row.lr:.2e} | grad norm {row.grad_norm:.3f}"
            f" | {row.tokens_per_s:,.0f} tokens/s"
            f" ({row.supervised_tokens / row.step_time_s:,.0f} supervised)"
            f" | {row.images / row.step_time_s:.1f} images/s"
            f" | {row.samples} samples | fill {row.pack_fill:.1%}"
            f" | {row.model_flops_per_s / 1e12:.3g} TFLOP/s{_share(row)}"
            f" | {row.peak_memory_bytes / 2**30:.2f} GiB | {_duration(left)} left{_slow(row)}"
        )

    def close(self) -> None:
        self.rows.add([])  # what has waited for space
        self.valid.add([])
        self.events.close()
        self.sinks.close()


class Events:
    """TensorBoard's event files: a new one at each start, and after a disk was full."""

    def __init__(self, folder: Path, start: int) -> None:
        self.folder = folder
        self.writer: Any = None
        self.add({}, start + 1)  # opens it

    def _open(self, start: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # A block is tried first: the writer's thread would print a traceback each time.
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / ".space", bytes(4096))
        (self.folder / ".space").unlink()
        return SummaryWriter(str(self.folder), purge_step=start + 1)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Record values of a step; they are lost where the disk is full."""
        try:
            self.writer = self.writer or self._open(step - 1)
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        except OSError:  # of a thread that writes: this writer is of no more use
            self.writer = None

    def close(self) -> None:
        if self.writer is not None:
            with suppress(OSError):
                self.writer.close()


def _slow(row: Row) -> str:
    return f" | stragglers: {spans(row.stragglers)}" if row.stragglers else ""


def _share(row: Row) -> str:
    """MFU, and beside it what the planner predicts for the same step."""
    if row.mfu is None:
        return ""
    if row.predicted_step_time_s is None:
        return f" (MFU {row.mfu:.1%})"
    predicted = row.mfu * row.step_time_s / row.predicted_step_time_s
    return (
        f" (MFU {row.mfu:.1%}, predicted {predicted:.1%}:"
        f" {row.step_time_s:.3g} s, predicted {row.predicted_step_time_s:.3g})"
    )


def keep_rows_up_to(path: Path, iteration: int) -> None:
    """Drop the rows of later steps, a last one that was cut off, and what a machine that went down
    has left in the place of others."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _iteration(line) <= iteration]
    if kept == lines[: len(kept)]:
        os.truncate(path, sum(map(len, kept)))  # on a full disk too
        return
    write_atomically(path, b"".join(kept))


def _iteration(line: bytes) -> float:
    """Of a row; infinite if it is none."""
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:d}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:d}:{seconds:02d}"
