"""The index beside tar shards: `index.npy` holds one row a sample, `index.json` the shards and the
data sets. `index.json` is written last, so a folder without it is not complete.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.schema import from_json
from megatron_gmai.data.sources.mixture import MAX_RATIO
from megatron_gmai.data.sources.remote import copy, exists, is_url

INDEX_FILE = "index.npy"
MANIFEST_FILE = "index.json"
REJECTED_FILE = "rejected.jsonl"
ORIGIN_FILE = "origin"  # beside a copy of an index: where the tar files are
FORMAT = 1
# One row a sample. A shard's rows are contiguous and in file order.
ROW = np.dtype(
    [
        ("shard", "<u4"),
        ("source", "<u2"),
        ("images", "<u2"),
        ("offset", "<u8"),  # of the first member's header
        ("size", "<u4"),  # up to the end of the last member
        ("crc", "<u4"),  # CRC-32 of these bytes
    ]
)


@dataclass(frozen=True, slots=True)  # there may be many, in every process
class ShardFile:
    """One tar file: its rows are the next `samples` ones of the index."""

    name: str
    samples: int
    size: int


@dataclass(frozen=True)
class SourceInfo:
    """What the shards hold of one data set of the list file."""

    name: str
    sample_ratio: float
    data_augment: bool
    samples: int
    rejected: int


@dataclass(frozen=True)
class Manifest:
    """Contents of `index.json`. `inputs` is the fingerprint of what the shards were made from."""

    shards: tuple[ShardFile, ...]
    sources: tuple[SourceInfo, ...]
    inputs: str
    format: int = FORMAT

    @property
    def samples(self) -> int:
        return sum(source.samples for source in self.sources)

    @property
    def rejected(self) -> int:
        return sum(source.rejected for source in self.sources)


def read_manifest(folder: Path) -> Manifest:
    """Reads `index.json`. Raises ValueError if it is missing, unreadable or of another format."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no complete shards ({MANIFEST_FILE} is missing); "
            "make them with tools/make_shards.py"
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(fields, dict) and fields.get("format") != FORMAT:
            raise ValueError(f"its format is {fields.get('format')!r:.20}, expected {FORMAT}")
        manifest = from_json(Manifest, fields)
        _check(manifest)
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}; make the shards again") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Raises ValueError for what no writer of ours puts there: shards that are not plain files of
    the folder, counts that do not belong together."""
    names = [shard.name for shard in manifest.shards]
    for name in names:
        if not name.endswith(".tar") or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"{name!r:.80} is no name of a tar file in its folder")
    if len(set(names)) < len(names):
        raise ValueError("a shard stands twice")
    if sum(shard.samples for shard in manifest.shards) != manifest.samples:
        raise ValueError("shards and data sets differ in their number of samples")
    if any(source.sample_ratio > MAX_RATIO for source in manifest.sources):
        raise ValueError(f"a ratio above {MAX_RATIO}")
    if len(manifest.sources) >= 2**16:
        raise ValueError("more data sets than the index can number")


def check_rows(rows: np.ndarray, manifest: Manifest) -> None:
    """Raises ValueError if the index does not belong to the manifest. Looks at the first row of
    each shard only: an index of millions is opened in no time, and `Shards` checks what it reads.
    """
    if rows.dtype != ROW or rows.ndim != 1 or len(rows) != manifest.samples:
        raise ValueError("its rows are not those of the manifest")
    counts = np.array([shard.samples for shard in manifest.shards], dtype=np.int64)
    if (counts < 1).any():
        raise ValueError("a shard without samples")
    first = rows[np.cumsum(counts) - counts]
    if (first["shard"] != np.arange(len(counts))).any():
        raise ValueError("its shards are not in order")
    if (first["source"] >= len(manifest.sources)).any():
        raise ValueError("it names a data set that is not there")


def copy_index(origin: str, folder: Path, extras: Sequence[str] = ()) -> None:
    """Makes `folder` stand for the shards in `origin`, a URL or a folder that cannot be written to:
    the index is copied, and `extras` that are there; the tar files stay. Raises ValueError."""
    url = origin if is_url(origin) else Path(origin).resolve().as_uri()
    folder.mkdir(parents=True, exist_ok=True)
    for name in (INDEX_FILE, REJECTED_FILE, *extras):
        if exists(f"{url}/{name}"):
            copy(f"{url}/{name}", str(folder / name))
    write_atomically(folder / ORIGIN_FILE, origin.encode())
    copy(f"{url}/{MANIFEST_FILE}", str(folder / MANIFEST_FILE))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `index.json` atomically: its presence says that the folder is complete."""
    write_atomically(folder / MANIFEST_FILE, json.dumps(asdict(manifest), indent=1).encode())


def save_index(folder: Path, rows: np.ndarray) -> None:
    """Writes `index.npy` atomically."""
    partial = folder / "index.partial.npy"
    partial.unlink(missing_ok=True)  # a link, in a stranger's folder, would be followed
    np.save(partial, rows)
    partial.replace(folder / INDEX_FILE)
