"""WebDataset tar shards: how a sample is laid out in tar members, written and taken apart.

A sample is a run of tar members that share a key: `KEY.json` (the annotation record) and
`KEY.0.png`, `KEY.1.jpg`, ... (the image files, in the order of the record).
"""

import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_gmai.data.images.formats import IMAGE_SUFFIXES
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.shards.index import ROW
from megatron_gmai.data.sources.json_text import Repeated, unique

MAX_SAMPLE = 2**30  # bytes
MAX_IMAGES = 2**16 - 1  # of a sample, as many as a row of the index counts
CAPTION_QUESTION = "Describe this image."
OCTAL = re.compile(rb"[0-7]+")
BLOCK = tarfile.BLOCKSIZE
# `tarfile` calls itself for each header that only speaks of the next.
TAR_ERRORS = (tarfile.TarError, OSError, ValueError, RecursionError)


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
        self._file: BinaryIO = self._partial.open("wb", buffering=2**20)
        self._rows: list[tuple[int, int, int, int, int, int]] = []

    def add(self, key: str, record: dict[str, Any], images: Sequence[tuple[str, bytes]]) -> int:
        """Appends a sample and returns its first byte; `images` are (suffix without dot, bytes).
        Raises BadSample for one that an index row cannot stand for."""
        try:
            members = [(f"{key}.json", json.dumps(record, ensure_ascii=False).encode("utf-8"))]
        except UnicodeEncodeError as error:
            raise BadSample(f"the record is not valid Unicode: {error.reason}") from error
        members += [(f"{key}.{i}.{suffix}", data) for i, (suffix, data) in enumerate(images)]
        span = b"".join(part for name, data in members for part in _member(name, data))
        check_size(len(images), len(span))
        offset = self._file.tell()
        self._file.write(span)
        self._rows.append((0, 0, len(images), offset, len(span), zlib.crc32(span)))
        return offset

    def close(self) -> np.ndarray:
        """Ends the tar file, gives it its name, and returns its rows (shard and source 0)."""
        self._file.write(bytes(2 * BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.rename(self.path)
        return np.array(self._rows, dtype=ROW)


def check_size(images: int, size: int) -> None:
    """Raises BadSample for a sample whose row the index cannot hold, or that no reader takes."""
    if images > MAX_IMAGES:
        raise BadSample(f"{images} images, more than {MAX_IMAGES}")
    if size > MAX_SAMPLE:
        raise BadSample(f"a sample of {size} bytes, more than {MAX_SAMPLE}")


# A header (POSIX ustar) of a file without name and size, and the sum of its bytes.
_EMPTY = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_EMPTY_SUM = int(_EMPTY[148:155].rstrip(b"\0"), 8)
_NO_SIZE = b"%011o" % 0


def _member(name: str, data: bytes) -> list[bytes]:
    """A tar member without time, owner or anything else that differs from run to run.

    The keys that we write are short and in ASCII, so name (at 0), size (124) and checksum (148) are
    all that differs between headers: `tarfile` takes 30 times as long.
    """
    raw, size = name.encode("ascii"), b"%011o" % len(data)
    assert len(raw) < 100 and len(size) == len(_NO_SIZE)
    checksum = b"%06o\0" % (_EMPTY_SUM + sum(raw) + sum(size) - sum(_NO_SIZE))
    header = b"".join([raw, _EMPTY[len(raw) : 124], size, _EMPTY[135:148], checksum, _EMPTY[155:]])
    return [header, data, bytes(-len(data) % BLOCK)]


def parse_sample(span: bytes) -> StoredSample:
    """Splits the tar members of one sample. Raises BadSample if they are not one.

    Images come in the order of the numbers in their names, then of the names. A sample without
    conversations but with a `txt` member is an image and its caption, as img2dataset writes them.
    """
    record: dict[str, Any] = {}
    images, caption, keys, suffixes = [], None, set(), set()
    for name, data in tar_members(span):
        if is_resource_fork(name):
            continue
        key, suffix = split_name(name)
        keys.add(key)
        first, kind = _image_kind(suffix)
        if suffix.lower() in suffixes:  # one of the two would be lost
            raise BadSample(f"the tar member {name!r} stands twice")
        suffixes.add(suffix.lower())
        if suffix.lower() == "json":
            record = parse_record(data)
        elif suffix.lower() == "txt":
            caption = _caption(data)
        elif kind in IMAGE_SUFFIXES:
            images.append((int(first) if first.isdecimal() else 0, suffix, data))
    if len(keys) != 1:
        raise BadSample("the tar members are not those of one sample")
    images.sort(key=lambda image: image[:2])
    if caption is not None and "conversations" not in record:
        if not images:
            raise BadSample("a caption without an image of a known kind")
        record = {**record, "conversations": _caption_turns(caption, len(images))}
    if not record:
        raise BadSample("neither an annotation nor a caption")
    return StoredSample(keys.pop(), record, tuple(data for _, _, data in images))


def _caption(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:  # replacing what is wrong would teach it to the model
        raise BadSample(f"the caption is not UTF-8: {error.reason}") from error


def _image_kind(suffix: str) -> tuple[str, str]:
    """`0.png` -> `0`, `png`; `nii.gz` counts as one ending."""
    parts = suffix.lower().split(".")
    ends = 2 if parts[-2:] == ["nii", "gz"] else 1
    return ".".join(parts[:-ends]), ".".join(parts[-ends:])


def _caption_turns(caption: str, images: int) -> list[dict[str, str]]:
    question = "<image>\n" * images + CAPTION_QUESTION
    return [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]


def is_resource_fork(name: str) -> bool:
    """Whether it is what macOS puts beside each file of an archive; no part of any sample."""
    return name.rpartition("/")[2].startswith("._")


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a tar member, as WebDataset splits them: at the first dot of the last
    part of the path."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def parse_record(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data, object_pairs_hook=unique)
    except Repeated as error:
        raise BadSample(f"in the annotation {error}") from error
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
    members = plain_members(span)
    if members is not None:
        yield from members
        return
    try:
        with tarfile.open(fileobj=io.BytesIO(span), mode="r:") as archive:
            for member in archive:
                # A sparse file would be filled up with zeros to whatever size its header says, and
                # a negative size leads back to an earlier header.
                if member.issparse() or not 0 <= member.size <= len(span):
                    raise BadSample(f"tar member {member.name!r} is not stored whole")
                file = archive.extractfile(member)
                if file is not None:
                    yield member.name, file.read()
    except TAR_ERRORS as error:
        raise BadSample(f"not a tar archive: {error}") from error


def padded_size(header: bytes) -> int:
    """Size in blocks, as bytes, of the member that a plain header describes; 0 if it is none."""
    field = header[124:136].rstrip(b"\0 ")
    return -(-int(field, 8) // BLOCK) * BLOCK if OCTAL.fullmatch(field) else 0


def plain_members(span: bytes) -> list[tuple[str, bytes]] | None:
    """Name and data of each member, or None if a header is not of the plain kind (POSIX ustar:
    name at 0, size in octal at 124, type at 156, prefix at 345)."""
    members, position = [], 0
    while position + BLOCK <= len(span):
        header = span[position : position + BLOCK]
        if not header.rstrip(b"\0"):
            break
        size_field = header[124:136].rstrip(b"\0 ")
        if header[156:157] not in b"0\0" or header[345] or not OCTAL.fullmatch(size_field):
            return None
        size = int(size_field, 8)
        data = span[position + BLOCK : position + BLOCK + size]
        if len(data) != size:
            return None
        members.append((header[:100].rstrip(b"\0").decode("utf-8", "replace"), data))
        position += BLOCK + size + -size % BLOCK
    return members
