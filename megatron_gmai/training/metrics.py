"""What a run tells: a progress line, JSON lines, TensorBoard."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_gmai.training.step import StepResult


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
) -> Row:
    """`flops` of the step's model work and `peak` a second, both of all ranks; `predicted` seconds
    of the step."""
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
    )


class MetricsLog:
    """Writes rows to `WORK_DIR/metrics.jsonl` and TensorBoard, and lines to the terminal.

    Used on one rank. Rows past `start` are dropped on opening: a resumed run repeats the steps
    since its checkpoint, and each step must stand in the file once.
    """

    def __init__(
        self, work_dir: Path, tensorboard_dir: Path, start: int, total: int, interval: int
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = work_dir / "metrics.jsonl"
        keep_rows_up_to(path, start)
        self.file: IO[str] = path.open("a", encoding="utf-8")
        self.tensorboard: Any = SummaryWriter(str(tensorboard_dir), purge_step=start + 1)
        self.start, self.total, self.interval = start, total, interval
        self.began = time.monotonic()

    def write(self, row: Row) -> None:
        """Record a step; every `interval` steps, and after the last, print a line."""
        if row.iteration % self.interval and row.iteration != self.total:
            return
        self.file.write(json.dumps(vars(row)) + "\n")
        self.file.flush()
        for name in ("loss", "lr", "grad_norm", "tokens_per_s", "pack_fill"):
            self.tensorboard.add_scalar(name, getattr(row, name), row.iteration)
        print(self.line(row), flush=True)

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
            f" | {row.peak_memory_bytes / 2**30:.2f} GiB | {_duration(left)} left"
        )

    def close(self) -> None:
        self.file.close()
        self.tensorboard.close()


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
    """Drop the rows of later steps, and a last one that was cut off."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _iteration(line) <= iteration]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _iteration(line: str) -> int:
    return int(json.loads(line)["iteration"])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:d}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:d}:{seconds:02d}"
