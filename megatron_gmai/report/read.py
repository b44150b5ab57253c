"""Reads what runs have written into their work directories, whole or cut off."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gmai.data.ledger import Rejection, read_ledger

METRICS_FILE = "metrics.jsonl"  # of training/metrics.py
STARTS_FILE = "environment.jsonl"  # of runtime/environment.py


@dataclass(frozen=True)
class Attempt:
    """The steps between one start of a run and its end, those included that were done again."""

    began: float  # seconds since 1970
    ended: float
    losses: dict[int, float]  # by step

    @property
    def first(self) -> int:
        return min(self.losses)

    @property
    def last(self) -> int:
        return max(self.losses)


@dataclass(frozen=True)
class RunRecord:
    """One work directory: a run of one phase."""

    folder: Path
    rows: list[dict[str, Any]]  # of metrics.jsonl, by step
    attempts: list[Attempt]
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    rejections: list[Rejection]
    valid: list[dict[str, Any]]  # losses on held-out packs, by step and data set
    skipped: list[dict[str, Any]]  # steps whose loss or gradient was not finite
    spikes: list[dict[str, Any]]  # steps whose loss stood far above those before

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def restarts(self) -> int:
        """Every start is written down; runs of earlier versions have their event files only."""
        return max(0, len(self.starts or self.attempts) - 1)

    @property
    def last_step(self) -> int:
        return int(self.rows[-1]["iteration"])


def read_runs(folder: Path) -> list[RunRecord]:
    """The run in `folder`, or the runs in the folders below it, in the order they were started.

    Raises ValueError if there is none.
    """
    folders = [folder] if (folder / METRICS_FILE).is_file() else _below(folder)
    runs = [run for run in map(_read_run, folders) if run.rows]
    if not runs:
        raise ValueError(
            f"{folder} holds no {METRICS_FILE} with a step in it, and no folder below it does; "
            "give the --work-dir of a run that has logged, or the folder of several"
        )
    return sorted(runs, key=lambda run: (run.attempts[0].began if run.attempts else 0, run.name))


def _below(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob(f"*/{METRICS_FILE}")] if folder.is_dir() else []


def _read_run(folder: Path) -> RunRecord:
    return RunRecord(
        folder=folder,
        rows=[row for row in _json_lines(folder / METRICS_FILE) if "iteration" in row],
        attempts=read_attempts(folder / "tensorboard"),
        config=_json(folder / "config.json"),
        starts=list(_json_lines(folder / STARTS_FILE)),
        rejections=read_ledger(folder / "rejected.jsonl"),
        valid=list(_json_lines(folder / "valid.jsonl")),
        skipped=list(_json_lines(folder / "skipped.jsonl")),
        spikes=list(_json_lines(folder / "spikes.jsonl")),
    )


def read_attempts(folder: Path) -> list[Attempt]:
    """One for each event file: a run opens a new one at each start, and never rewrites one, so they
    also hold the steps that a restart has taken back."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    attempts = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        times: list[float] = []
        losses: dict[int, float] = {}
        for event in EventFileLoader(str(file)).Load():
            times.append(event.wall_time)
            for value in event.summary.value:
                if value.tag == "loss":
                    losses[event.step] = _scalar(value)
        if losses:
            attempts.append(Attempt(times[0], times[-1], losses))
    return sorted(attempts, key=lambda attempt: attempt.began)


def _scalar(value: Any) -> float:
    """The loader turns simple values into tensors of one float."""
    return float(value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON Lines file; a last line that is still being written is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
