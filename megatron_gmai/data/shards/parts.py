"""What an unfinished build has completed: index rows and rejections of each unit, a file each."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.ledger import Rejection, parse_line
from megatron_gmai.data.shards.index import ROW
from megatron_gmai.data.shards.units import Unit


def save_part(
    folder: Path, unit: Unit, rows: np.ndarray, rejections: Sequence[Rejection], fingerprint: str
) -> None:
    """The JSON file comes last and means: complete."""
    write_atomically(folder / f"{unit.shard}.npy", rows.tobytes())
    lines = [line._asdict() for line in rejections]
    part = {"fingerprint": fingerprint, "rejections": lines}
    write_atomically(folder / f"{unit.shard}.json", json.dumps(part).encode())


def load_part(folder: Path, unit: Unit) -> tuple[str, list[Rejection], np.ndarray] | None:
    """Fingerprint, rejections and rows of a unit that is complete."""
    file = folder / f"{unit.shard}.json"
    if not file.exists():
        return None
    part = json.loads(file.read_text())
    rows = np.fromfile(folder / f"{unit.shard}.npy", dtype=ROW)
    return part["fingerprint"], [parse_line(line) for line in part["rejections"]], rows
