"""What an unfinished build has completed: index rows and rejections of each unit."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.ledger import Rejection, as_fields
from megatron_gmai.data.schema import from_json
from megatron_gmai.data.shards.index import ROW
from megatron_gmai.data.shards.units import Unit


@dataclass(frozen=True)
class _Content:
    fingerprint: str
    rows: str  # bytes of the index rows, in hexadecimal
    rejections: tuple[Rejection, ...]


def save_part(
    folder: Path, unit: Unit, rows: np.ndarray, rejections: Sequence[Rejection], fingerprint: str
) -> None:
    """Written after the tar file: its presence says that the unit is complete. One file, because
    each that is safe on the disk costs as much time as a hundred records."""
    content = {
        "fingerprint": fingerprint,
        "rows": rows.tobytes().hex(),
        "rejections": [as_fields(line) for line in rejections],
    }
    write_atomically(folder / f"{unit.shard}.json", json.dumps(content).encode())


def load_part(folder: Path, unit: Unit) -> tuple[str, list[Rejection], np.ndarray] | None:
    """Fingerprint, rejections and rows of a unit; None if it is not complete."""
    try:
        content = from_json(_Content, json.loads((folder / f"{unit.shard}.json").read_text()))
        rows = np.frombuffer(bytes.fromhex(content.rows), dtype=ROW)
    except (OSError, ValueError, RecursionError):
        return None
    return content.fingerprint, list(content.rejections), rows.copy()
