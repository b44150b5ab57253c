"""The index beside tar shards: `index.npy` holds one row a sample, `index.json` the shards and the
data sets. `index.json` is written last, so a folder without it is not complete.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.sources.remote import copy, filesystem, is_url

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
        shards = tuple(ShardFile(**shard) for shard in fields["shards"])
        sources = tuple(SourceInfo(**source) for source in fields["sources"])
        manifest = Manifest(shards, sources, fields["inputs"], fields["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}; make the shards again") from error
    if manifest.format != FORMAT:
        raise ValueError(f"{file} has format {manifest.format}, expected {FORMAT}; make it again")
    return manifest


def copy_index(origin: str, folder: Path, extras: Sequence[str] = ()) -> None:
    """Makes `folder` stand for the shards in `origin`, a URL or a folder that cannot be written to:
    the index is copied, and `extras` that are there; the tar files stay. Raises ValueError."""
    url = origin if is_url(origin) else Path(origin).resolve().as_uri()
    folder.mkdir(parents=True, exist_ok=True)
    for name in (INDEX_FILE, REJECTED_FILE, *extras):
        files, path = filesystem(f"{url}/{name}")
        if files.exists(path):
            copy(f"{url}/{name}", str(folder / name))
    write_atomically(folder / ORIGIN_FILE, origin.encode())
    copy(f"{url}/{MANIFEST_FILE}", str(folder / MANIFEST_FILE))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `index.json` atomically: its presence says that the folder is complete."""
    write_atomically(folder / MANIFEST_FILE, json.dumps(asdict(manifest), indent=1).encode())


def save_index(folder: Path, rows: np.ndarray) -> None:
    """Writes `index.npy` atomically."""
    partial = folder / "index.partial.npy"
    np.save(partial, rows)
    partial.replace(folder / INDEX_FILE)
