"""Alarm for a loss that stands far above those before it: one line, and the samples of the step."""

import json
import math
import statistics
from collections import deque
from pathlib import Path

from megatron_gmai.data.files import Lines
from megatron_gmai.training.metrics import keep_rows_up_to
from megatron_gmai.training.step import StepResult

FILE = "spikes.jsonl"
_WINDOW = 100  # losses that a new one is held against
_FEWEST = 20  # of them before anything is told: a run begins steeply
_DEVIATIONS = 8.0  # above the median; losses of a healthy run seldom reach 5
_SIGMA = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
_LEAST = 0.01  # of the median, as a deviation: a loss that hardly moves alarms nobody


class LossSpikes:
    """Watches the losses of a run, on every rank alike.

    Median and median absolute deviation stay what they are while up to half of the window are
    spikes. With a work directory (one rank) each spike is a line of `WORK_DIR/spikes.jsonl`; lines
    past `start` are dropped on opening, as a resumed run repeats those steps.
    """

    def __init__(self, work_dir: Path | None, start: int) -> None:
        self.path = None if work_dir is None else work_dir / FILE
        self.lines = None if self.path is None else Lines(self.path)
        self.losses: deque[float] = deque(maxlen=_WINDOW)
        if self.path is not None:
            keep_rows_up_to(self.path, start)

    def limit(self) -> float:
        """The loss from which a step is a spike; infinite as long as too few are known."""
        if len(self.losses) < _FEWEST:
            return math.inf
        median = statistics.median(self.losses)
        deviation = _SIGMA * statistics.median(abs(loss - median) for loss in self.losses)
        return median + _DEVIATIONS * max(deviation, _LEAST * median)

    def is_spike(self, loss: float) -> bool:
        """Losses that are not finite are no spikes: such steps are skipped and told as that."""
        return math.isfinite(loss) and loss > self.limit()

    def add(self, iteration: int, result: StepResult) -> None:
        """Take note of a step, and tell a spike; `result.keys` name its samples then."""
        if self.lines is not None and self.is_spike(result.loss):
            typical = statistics.median(self.losses)
            line = {
                "iteration": iteration,
                "loss": result.loss,
                "median": typical,
                "keys": result.keys,
            }
            self.lines.add([json.dumps(line) + "\n"])
            print(
                f"loss spike at step {iteration}: {result.loss:.4f} after a median of "
                f"{typical:.4f}; its {len(result.keys)} samples are named in {self.path}",
                flush=True,
            )
        if math.isfinite(result.loss):
            self.losses.append(result.loss)
