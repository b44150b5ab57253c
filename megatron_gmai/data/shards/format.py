"""WebDataset tar shards with an index: written in order, read at random.

A sample is a run of tar members that share a key: `KEY.json` (the annotation record) and
`KEY.0.png`, `KEY.1.jpg`, ... (the image files, in the order of the record). `index.npy` holds one
row a sample, `index.json` the shards and the data sets; it is written last, so a folder without it
is not complete.
"""

import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.images.formats import IMAGE_SUFFIXES
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.sources.remote import copy, filesystem, is_url

INDEX_FILE = "index.npy"
MANIFEST_FILE = "index.json"
REJECTED_FILE = "rejected.jsonl"
ORIGIN_FILE = "origin"  # beside a copy of an index: where the tar files are
FORMAT = 1
CAPTION_QUESTION = "Describe this image."
OCTAL = re.compile(rb"[0-7]+")
HEAD = 16_384  # bytes in which most annotations end
OPEN_FILES = 64  # per process
BLOCK = tarfile.BLOCKSIZE
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


@dataclass(frozen=True)
class StoredSample:
    """One sample as stored: the annotation record and the image files it names, undecoded."""

    key: str
    record: dict[str, Any]
    images: tuple[bytes, ...]


class ShardWriter:
    """Writes one tar file. It gets its name when it is complete; see `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._file: BinaryIO = self._partial.open("wb")
        self._rows: list[tuple[int, int, int, int, int, int]] = []

    def add(self, key: str, record: dict[str, Any], images: Sequence[tuple[str, bytes]]) -> None:
        """Appends a sample; `images` are (file suffix without dot, bytes)."""
        members = [(f"{key}.json", json.dumps(record, ensure_ascii=False).encode("utf-8"))]
        members += [(f"{key}.{i}.{suffix}", data) for i, (suffix, data) in enumerate(images)]
        span = b"".join(_member(name, data) for name, data in members)
        offset = self._file.tell()
        self._file.write(span)
        self._rows.append((0, 0, len(images), offset, len(span), zlib.crc32(span)))

    def close(self) -> np.ndarray:
        """Ends the tar file, gives it its name, and returns its rows (shard and source 0)."""
        self._file.write(bytes(2 * BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.rename(self.path)
        return np.array(self._rows, dtype=ROW)


def _member(name: str, data: bytes) -> bytes:
    """A tar member without time, owner or anything else that differs from run to run."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    padding = -len(data) % BLOCK
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(padding)


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
            rows = np.load(self.folder / INDEX_FILE, mmap_mode="r")
        except Exception as error:  # numpy raises anything on damaged headers
            raise ValueError(f"cannot read {self.folder / INDEX_FILE}: {error}") from error
        if rows.dtype != ROW or len(rows) != self.manifest.samples:
            raise ValueError(f"{self.folder / INDEX_FILE} does not belong to {MANIFEST_FILE}")
        return rows

    @cached_property
    def first_rows(self) -> np.ndarray:
        """int64 [shards + 1]: shard s holds rows first_rows[s] up to first_rows[s + 1]."""
        counts = [shard.samples for shard in self.manifest.shards]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    def source_name(self, sample: int) -> str:
        return self.manifest.sources[int(self.rows[sample]["source"])].name

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
        if shard >= len(shards) or offset + size > shards[shard].size:
            raise BadSample("the index points outside of the shard")
        return shard, offset, size

    def read_record(self, sample: int) -> tuple[str, dict[str, Any]]:
        """Key and annotation of a sample, without its images and without the checksum.

        Reads a few kilobytes where the annotation comes first, as in our own shards. Raises
        BadSample like `read`.
        """
        shard, offset, size = self._span(sample)
        head = self._bytes(shard, offset, min(size, HEAD))
        members = _plain_members(head[: BLOCK + _padded_size(head)])
        if members:
            key, suffix = split_name(members[0][0])
            record = _parse_record(members[0][1]) if suffix == "json" else {}
            if "conversations" in record:
                return key, record
        stored = self.read(sample)
        return stored.key, stored.record

    def place(self, sample: int) -> str:
        """Where the sample lies; names it when its own key cannot be read."""
        row = self.rows[sample]
        return f"{self.manifest.shards[int(row['shard'])].name}@{row['offset']}"

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        if not is_url(self._origin):
            return os.pread(self._open(shard).fileno(), size, offset)
        name = f"{self._origin}/{self.manifest.shards[shard].name}"
        files, path = filesystem(name)
        try:
            return files.cat_file(path, offset, offset + size)
        except OSError as error:
            raise ValueError(f"cannot read shard {name}: {error}") from error

    def _open(self, shard: int) -> BinaryIO:
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            path = Path(self._origin) / self.manifest.shards[shard].name
            try:
                self._files[shard] = path.open("rb", buffering=0)
            except OSError as error:
                raise ValueError(f"cannot open shard {path}: {error.strerror}") from error
        return self._files[shard]


def parse_sample(span: bytes) -> StoredSample:
    """Splits the tar members of one sample. Raises BadSample if they are not one.

    Images come in the order of the numbers in their names, then of the names. A sample without
    conversations but with a `txt` member is an image and its caption, as img2dataset writes them.
    """
    record: dict[str, Any] = {}
    images, caption, keys = [], None, set()
    for name, data in tar_members(span):
        key, suffix = split_name(name)
        keys.add(key)
        first, _, kind = suffix.rpartition(".")
        if suffix == "json":
            record = _parse_record(data)
        elif suffix == "txt":
            caption = data.decode("utf-8", "replace")
        elif kind.lower() in IMAGE_SUFFIXES or suffix.lower().endswith("nii.gz"):
            images.append((int(first) if first.isdecimal() else 0, suffix, data))
    if len(keys) != 1:
        raise BadSample("the tar members are not those of one sample")
    images.sort(key=lambda image: image[:2])
    if caption is not None and "conversations" not in record:
        record = {**record, "conversations": _caption_turns(caption, len(images))}
    if not record:
        raise BadSample("neither an annotation nor a caption")
    return StoredSample(keys.pop(), record, tuple(data for _, _, data in images))


def _caption_turns(caption: str, images: int) -> list[dict[str, str]]:
    question = "<image>\n" * images + CAPTION_QUESTION
    return [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a tar member, as WebDataset splits them: at the first dot of the last
    part of the path."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def _parse_record(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"the annotation is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadSample("the annotation is not a JSON object")
    return record


def tar_members(span: bytes) -> Iterator[tuple[str, bytes]]:
    """Regular files in a run of tar blocks: (name, data). Raises BadSample if it is damaged.

    Plain headers are read here, ten times faster than by `tarfile`, which does the others (long
    names, extended attributes).
    """
    members = _plain_members(span)
    if members is not None:
        yield from members
        return
    try:
        with tarfile.open(fileobj=io.BytesIO(span), mode="r:") as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None:
                    yield member.name, file.read()
    except (tarfile.TarError, ValueError, OSError) as error:
        raise BadSample(f"not a tar archive: {error}") from error


def _padded_size(header: bytes) -> int:
    """Size in blocks, as bytes, of the member that a plain header describes; 0 if it is none."""
    field = header[124:136].rstrip(b"\0 ")
    return -(-int(field, 8) // BLOCK) * BLOCK if OCTAL.fullmatch(field) else 0


def _plain_members(span: bytes) -> list[tuple[str, bytes]] | None:
    """Name and data of each member, or None if a header is not of the plain kind (POSIX ustar:
    name at 0, size in octal at 124, type at 156, prefix at 345)."""
    members, place = [], 0
    while place + BLOCK <= len(span):
        header = span[place : place + BLOCK]
        if not header.rstrip(b"\0"):
            break
        size_field = header[124:136].rstrip(b"\0 ")
        if header[156:157] not in b"0\0" or header[345] or not OCTAL.fullmatch(size_field):
            return None
        size = int(size_field, 8)
        data = span[place + BLOCK : place + BLOCK + size]
        if len(data) != size:
            return None
        members.append((header[:100].rstrip(b"\0").decode("utf-8", "replace"), data))
        place += BLOCK + size + -size % BLOCK
    return members


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
