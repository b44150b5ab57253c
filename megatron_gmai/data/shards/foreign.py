"""An index for tar shards that WebDataset, img2dataset or the like have written.

The tar files stay as they are, metadata of their images included; only `index.npy`, `index.json`
and the ledger are put beside them. A sample is a run of members with the same key: a JSON record
with conversations, or a text that becomes the caption of the image, and image files.
"""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.ledger import BadSample, Rejection, dump_line
from megatron_gmai.data.shards.format import BLOCK, parse_sample, split_name
from megatron_gmai.data.shards.index import (
    MANIFEST_FILE,
    REJECTED_FILE,
    ROW,
    Manifest,
    ShardFile,
    SourceInfo,
    read_manifest,
    save_index,
    write_manifest,
)

MAX_SAMPLE = 2**30  # bytes


def index_shards(folder: str | os.PathLike[str]) -> Manifest:
    """Indexes the tar files of a folder as one data set, named like the folder.

    Every image is decoded once; unusable samples go to the ledger. Returns at once if the folder
    has an index of the same files. Raises ValueError if there are no tar files or one is damaged.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.tar"))
    if not files:
        raise ValueError(f"{folder} holds no .tar files")
    inputs = _fingerprint(files)
    if (folder / MANIFEST_FILE).exists():
        manifest = read_manifest(folder)
        if manifest.inputs != inputs:
            raise ValueError(f"{folder} has an index of other files; delete {MANIFEST_FILE} first")
        return manifest
    name = folder.resolve().name
    rows = [np.empty(0, dtype=ROW)]
    shards: list[ShardFile] = []
    rejections: list[Rejection] = []
    for file in files:
        found, bad = _index_file(file, len(shards), name)
        rejections += bad
        if len(found):
            rows.append(found)
            shards.append(ShardFile(file.name, len(found), file.stat().st_size))
    write_atomically(folder / REJECTED_FILE, "".join(map(dump_line, rejections)).encode())
    index = np.concatenate(rows)
    save_index(folder, index)
    source = SourceInfo(name, 1.0, False, len(index), len(rejections))
    manifest = Manifest(tuple(shards), (source,), inputs)
    write_manifest(folder, manifest)
    return manifest


def _fingerprint(files: list[Path]) -> str:
    entries = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]


def _index_file(file: Path, shard: int, source: str) -> tuple[np.ndarray, list[Rejection]]:
    """Rows of the usable samples of one tar file, and the others."""
    rows, rejections = [], []
    with file.open("rb") as stream:
        for key, members in groupby(_members(file), lambda member: split_name(member.name)[0]):
            try:
                rows.append(_row(list(members), stream, shard))
            except BadSample as error:
                rejections.append(Rejection(f"{file.name}/{key}", source, str(error)))
    return np.array(rows, dtype=ROW), rejections


def _members(file: Path) -> Iterator[tarfile.TarInfo]:
    """All members but folders, which are no part of any sample."""
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                if not member.isdir():
                    yield member
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{file} is not a plain tar file: {error}") from error


def _row(members: list[tarfile.TarInfo], stream: BinaryIO, shard: int) -> tuple[int, ...]:
    """The index row of one sample, after all checks."""
    for member in members:
        path = PurePosixPath(member.name)
        if not member.isreg():
            raise BadSample(f"tar member {member.name!r} is a link or a device, not a file")
        if path.is_absolute() or ".." in path.parts:
            raise BadSample(f"tar member {member.name!r} has a name that leaves its folder")
    last = members[-1]
    start = members[0].offset
    size = last.offset_data + last.size + -last.size % BLOCK - start
    if size > MAX_SAMPLE:
        raise BadSample(f"a sample of {size} bytes, more than {MAX_SAMPLE}")
    stream.seek(start)
    span = stream.read(size)
    if len(span) != size:
        raise BadSample("the tar file ends inside of the sample")
    sample = parse_sample(span)
    for data in sample.images:
        decode(data)
    return shard, 0, len(sample.images), start, size, zlib.crc32(span)
