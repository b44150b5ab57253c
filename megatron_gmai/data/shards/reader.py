"""A complete folder of shards, read at random through its index."""

import os
import stat
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.shards.format import (
    BLOCK,
    MAX_SAMPLE,
    StoredSample,
    padded_size,
    parse_record,
    parse_sample,
    plain_members,
    split_name,
)
from megatron_gmai.data.shards.index import (
    INDEX_FILE,
    MANIFEST_FILE,
    ORIGIN_FILE,
    check_rows,
    read_manifest,
)
from megatron_gmai.data.sources.remote import is_url, read_span

HEAD = 16_384  # bytes in which most annotations end
OPEN_FILES = 64  # per process


class Shards:
    """A complete folder of shards, open for random reads. Cheap to open, pickle and fork."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises ValueError if the folder holds no complete set of shards."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        origin = self.folder / ORIGIN_FILE
        self._origin = origin.read_text() if origin.is_file() else str(self.folder)
        self._files: dict[int, BinaryIO] = {}

    def __reduce__(self) -> tuple[type["Shards"], tuple[Path]]:
        return Shards, (self.folder,)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def rows(self) -> np.ndarray:
        """The index, mapped and not loaded: all processes of a node share its memory."""
        try:
            if not (self.folder / INDEX_FILE).is_file():  # a pipe would wait for ever
                raise ValueError("it is no file")
            rows = np.load(self.folder / INDEX_FILE, mmap_mode="r")
        except Exception as error:  # numpy raises anything on damaged headers
            raise ValueError(f"cannot read {self.folder / INDEX_FILE}: {error}") from error
        try:
            check_rows(rows, self.manifest)
        except ValueError as error:
            raise ValueError(
                f"{self.folder / INDEX_FILE} does not belong to {MANIFEST_FILE}: {error}"
            ) from error
        return rows

    @cached_property
    def first_rows(self) -> np.ndarray:
        """int64 [shards + 1]: shard s holds rows first_rows[s] up to first_rows[s + 1]."""
        counts = [shard.samples for shard in self.manifest.shards]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    @property
    def origin(self) -> str:
        """Folder or URL of the tar files, which may lie elsewhere than their index."""
        return self._origin

    def source_name(self, sample: int) -> str:
        return self.manifest.sources[self.source_of(sample)].name

    def source_of(self, sample: int) -> int:
        """Number of the sample's data set: that of its shard, whatever its own row says."""
        shard = int(np.searchsorted(self.first_rows, sample, side="right")) - 1
        return int(self.rows[int(self.first_rows[shard])]["source"])

    def read(self, sample: int) -> StoredSample:
        """One sample, by its row. Raises BadSample if the stored bytes are not the ones written.

        Every process that reads the sample comes to the same decision, whether it needs the
        images or not, because the checksum covers all members.
        """
        shard, offset, size = self._span(sample)
        span = self._bytes(shard, offset, size)
        if zlib.crc32(span) != self.rows[sample]["crc"]:
            raise BadSample("the stored bytes have changed since they were written (checksum)")
        return parse_sample(span)

    def _span(self, sample: int) -> tuple[int, int, int]:
        """Shard, first byte and size of a sample."""
        row = self.rows[sample]
        shard, offset, size = (int(row[name]) for name in ("shard", "offset", "size"))
        shards = self.manifest.shards
        first, last = self.first_rows[shard : shard + 2] if shard < len(shards) else (0, 0)
        if not first <= sample < last or offset + size > shards[shard].size or size > MAX_SAMPLE:
            raise BadSample("the index points outside of the shard")
        return shard, offset, size

    def read_record(self, sample: int) -> tuple[str, dict[str, Any]]:
        """Key and annotation of a sample, without its images and without the checksum.

        Reads a few kilobytes where the annotation comes first, as in our own shards. Raises
        BadSample like `read`.
        """
        shard, offset, size = self._span(sample)
        head = self._bytes(shard, offset, min(size, HEAD))
        members = plain_members(head[: BLOCK + padded_size(head)])
        if members:
            key, suffix = split_name(members[0][0])
            record = parse_record(members[0][1]) if suffix.lower() == "json" else {}
            if "conversations" in record:
                return key, record
        stored = self.read(sample)
        return stored.key, stored.record

    def rows_of(self, shard: int) -> np.ndarray:
        """The index rows of one shard."""
        return self.rows[int(self.first_rows[shard]) : int(self.first_rows[shard + 1])]

    def location(self, sample: int) -> str:
        """Tar file and first byte: another text for each sample, whatever its own key is."""
        row = self.rows[sample]
        shard = int(np.searchsorted(self.first_rows, sample, side="right")) - 1
        return f"{self.manifest.shards[shard].name}@{row['offset']}"

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        if not is_url(self._origin):
            return os.pread(self._open(shard).fileno(), size, offset)
        name = f"{self._origin}/{self.manifest.shards[shard].name}"
        return read_span(name, offset, size)

    def _open(self, shard: int) -> BinaryIO:
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            path = Path(self._origin) / self.manifest.shards[shard].name
            try:
                # Without blocking: a pipe under that name would wait for ever.
                handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                self._files[shard] = open(handle, "rb", buffering=0)  # noqa: SIM115
            except OSError as error:
                raise ValueError(f"cannot open shard {path}: {error.strerror}") from error
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ValueError(f"cannot open shard {path}: it is no file")
        return self._files[shard]
