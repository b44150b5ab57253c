"""Steps whose loss or gradient is not finite: skipped, written down, and bounded in number."""

import json
from collections.abc import Callable
from pathlib import Path

from megatron_gmai.data.files import Lines
from megatron_gmai.training.metrics import keep_rows_up_to
from megatron_gmai.training.step import StepResult

FILE = "skipped.jsonl"


class SkippedSteps:
    """Counts the skipped steps of a run, on every rank alike.

    With a work directory (one rank) each is a line of `WORK_DIR/skipped.jsonl`: iteration, reason,
    and the keys of the samples of its global batch. Lines past `start` are dropped on opening, as
    in the metrics: a resumed run repeats those steps.
    """

    def __init__(self, work_dir: Path | None, start: int, most_in_a_row: int) -> None:
        self.path = None if work_dir is None else work_dir / FILE
        self.lines = None if self.path is None else Lines(self.path)
        self.total = self.in_a_row = 0
        self.most_in_a_row = most_in_a_row
        if self.path is not None and self.path.exists():
            keep_rows_up_to(self.path, start)
            self.total = len(self.path.read_text(encoding="utf-8").splitlines())

    def add(self, iteration: int, result: StepResult, newest: Callable[[], Path | None]) -> None:
        """Take note of a step, skipped or not; `newest` gives the newest checkpoint.

        Raises:
            ValueError: it is the last of too many skipped steps in a row.
        """
        if not result.not_finite:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        if self.lines is not None:
            line = {"iteration": iteration, "reason": result.not_finite, "keys": result.keys}
            self.lines.add([json.dumps(line) + "\n"])
            print(
                f"step {iteration} skipped: {result.not_finite}; its {len(result.keys)} samples "
                f"are named in {self.path}",
                flush=True,
            )
        if self.in_a_row >= self.most_in_a_row:
            checkpoint = newest()
            raise ValueError(
                f"{self.in_a_row} steps in a row up to step {iteration} had no finite loss and "
                f"gradient; none of them changed a weight. The last good checkpoint is "
                f"{checkpoint or 'none: nothing was saved yet'}. Look at {FILE}, lower --lr, or "
                "allow more with --max-skipped-steps."
            )
