"""An index for tar shards that WebDataset, img2dataset or the like have written.

The tar files stay as they are, metadata of their images included; only `index.npy`, `index.json`
and the ledger are put beside them. A sample is a run of members with the same key: a JSON record
with conversations, or a text that becomes the caption of the image, and image files.
"""

import hashlib
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.ledger import BadSample, Rejection, dump_line
from megatron_gmai.data.lock import building, is_read_only
from megatron_gmai.data.pool import Report, WorkerDied, run_jobs
from megatron_gmai.data.progress import Progress
from megatron_gmai.data.shards.format import (
    BLOCK,
    TAR_ERRORS,
    check_size,
    is_resource_fork,
    parse_sample,
    split_name,
)
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
from megatron_gmai.data.sources.records import MAX_RECORD
from megatron_gmai.data.text.conversation import image_names, parse_conversation

# Tar files by name that are not indexed: what is packed cannot be read at random.
PASSED_OVER = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|t[gbx]z2?|TAR)$")


def index_shards(
    folder: str | os.PathLike[str], workers: int = 0, log: Callable[[str], None] = lambda line: None
) -> Manifest:
    """Indexes the tar files of a folder as one data set, named like the folder.

    Every annotation is checked and every image decoded once, by `workers` processes (0: this one);
    unusable samples, and parts of tar files that are lost, go to the ledger. Returns at once if the
    folder has an index of the same files. Raises ValueError if there are no tar files, or pipes and
    folders of such a name.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.tar"))
    if not files:
        raise ValueError(f"{folder} holds no .tar files")
    for file in files:
        if not file.is_file():  # reading a pipe or a device would never end
            raise ValueError(f"{file} is no file, or a link to none; take it out of the folder")
    if packed := sorted(file.name for file in folder.iterdir() if PASSED_OVER.search(file.name)):
        log(f"{folder}: {len(packed)} file(s) passed over, as {packed[0]}: unpack them to .tar")
    with building(folder, log) as holder:
        inputs = _fingerprint(files)
        if (folder / MANIFEST_FILE).exists():
            manifest = read_manifest(folder)
            if manifest.inputs != inputs:
                raise ValueError(
                    f"{folder} has an index of other files; delete {MANIFEST_FILE} first"
                )
            log(f"index of {folder}: reused, its tar files are unchanged")
            return manifest
        if is_read_only(folder):
            raise ValueError(f"{folder} cannot be written to: the index has to lie beside its tars")
        found = _index(folder, files, workers, Progress(log, holder.tell))
        return _finish(folder, files, found, inputs)


def _fingerprint(files: list[Path]) -> str:
    entries = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]


Found = tuple[np.ndarray, list[Rejection]]


def _index(folder: Path, files: list[Path], workers: int, progress: Progress) -> list[Found]:
    size = sum(file.stat().st_size for file in files)
    progress.begin(f"indexing {len(files)} tar file(s), samples", 0, size)
    work = partial(index_file, folder.resolve().name)
    found: dict[int, Found] = {}
    try:
        found.update(run_jobs(work, files, workers if len(files) > 1 else 0, progress))
    except WorkerDied as error:
        raise ValueError(f"{error} at sample {error.item + 1} of {error.job}") from error
    return [found[number] for number in range(len(files))]


def _finish(folder: Path, files: list[Path], found: list[Found], inputs: str) -> Manifest:
    rows = [np.empty(0, dtype=ROW)]
    shards: list[ShardFile] = []
    for file, (own, _) in zip(files, found, strict=True):
        if len(own):
            own["shard"] = len(shards)
            rows.append(own)
            shards.append(ShardFile(file.name, len(own), file.stat().st_size))
    rejections = [line for _, lines in found for line in lines]
    write_atomically(folder / REJECTED_FILE, "".join(map(dump_line, rejections)).encode())
    index = np.concatenate(rows)
    save_index(folder, index)
    source = SourceInfo(folder.resolve().name, 1.0, False, len(index), len(rejections))
    manifest = Manifest(tuple(shards), (source,), inputs)
    write_manifest(folder, manifest)
    return manifest


def index_file(source: str, file: Path, report: Report) -> Found:
    """Rows of the usable samples of one tar file (shard 0), and the others."""
    rows, rejections, keys = [], list[Rejection](), set[str]()
    members = _Members(file)
    with file.open("rb") as stream:
        samples = groupby(members, lambda member: split_name(member.name)[0])
        for done, (key, run) in enumerate(samples):
            sample = list(run)
            report(done, sample[0].offset)
            try:
                if key in keys:
                    raise BadSample(f"the key {key!r} is that of an earlier sample of the file")
                keys.add(key)
                rows.append(_row(sample, stream))
            except BadSample as error:
                origin = f"{file.name}@{sample[0].offset}"
                rejections.append(Rejection(origin, source, str(error), id=key, image=error.image))
    report(len(rows) + len(rejections), file.stat().st_size)
    lost = members.lost()
    if lost is not None:
        origin = f"{file.name}@{members.end}+"
        rejections.append(Rejection(origin, source, lost))
    return np.array(rows, dtype=ROW), rejections


class _Members:
    """All members of a tar file but folders and macOS's resource forks, which are no part of any
    sample.

    `tarfile` takes a header that it cannot read for the end, so what follows has to be looked at.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.end = 0  # first byte behind the last member
        self._error = ""

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        try:
            with tarfile.open(self.file, "r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                    if member.size < 0 or archive.offset <= self.end:  # it would go round for ever
                        self._error = f" (a member of {member.size} bytes)"
                        return
                    self.end = archive.offset
                    if not (member.isdir() or is_resource_fork(member.name)):
                        yield member
        except TAR_ERRORS as error:
            self._error = f" ({error})"

    def lost(self) -> str | None:
        """What is wrong behind the last member; None if the file ends as it should."""
        size = self.file.stat().st_size
        if self.end > size:
            return f"the tar file is cut: its last member ends {self.end - size} bytes behind it"
        with self.file.open("rb") as stream:
            stream.seek(self.end)
            mark = stream.read(BLOCK)
            if not mark.strip(b"\0") and mark:
                while chunk := stream.read(2**20):
                    if chunk.strip(b"\0"):
                        return (
                            f"the tar file goes on behind its end mark at byte {self.end}: up to "
                            f"{size - self.end} bytes are lost. If two were joined, take them apart"
                        )
                return None
        if not mark:
            return f"the tar file has no end mark at byte {self.end}: what followed may be cut off"
        return (
            f"the tar file is damaged at byte {self.end}{self._error}: the {size - self.end} bytes "
            "from there on are lost"
        )


def _in_blocks(size: int) -> int:
    return size + -size % BLOCK


def _row(members: list[tarfile.TarInfo], stream: BinaryIO) -> tuple[int, ...]:
    """The index row of one sample, after all checks."""
    for member in members:
        path = PurePosixPath(member.name)
        if not member.isreg():
            raise BadSample(f"tar member {member.name!r} is a link or a device, not a file")
        if member.issparse():  # a header of some bytes stands for gigabytes of zeros
            raise BadSample(f"tar member {member.name!r} is a sparse file")
        if member.size > MAX_RECORD and split_name(member.name)[1].lower() in ("json", "txt"):
            raise BadSample(f"tar member {member.name!r} is a text of more than {MAX_RECORD} bytes")
        if path.is_absolute() or ".." in path.parts:
            raise BadSample(f"tar member {member.name!r} has a name that leaves its folder")
    last = members[-1]
    start = members[0].offset
    size = last.offset_data + _in_blocks(last.size) - start
    check_size(0, size)
    stream.seek(start)
    span = stream.read(size)
    if len(span) != size:
        raise BadSample("the tar file ends inside of the sample")
    sample = parse_sample(span)
    check_size(len(sample.images), size)
    if not sample.images and image_names(sample.record):
        raise BadSample("the annotation names an image, and the sample has none")
    parse_conversation(sample.record, len(sample.images))
    for number, data in enumerate(sample.images):
        try:
            decode(data)
        except BadSample as error:
            raise BadSample(f"image {number}: {error}", str(number)) from error
    return 0, 0, len(sample.images), start, size, zlib.crc32(span)
