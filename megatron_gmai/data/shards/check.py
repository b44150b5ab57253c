"""One annotation record and its images, checked before they go into a shard."""

import os
import re
import stat
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from megatron_gmai.data.images.pages import take_pages
from megatron_gmai.data.images.privacy import JPEG_TEXTS, stored_image, strip_metadata
from megatron_gmai.data.images.sizes import check_size as check_sides
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.shards.format import check_size
from megatron_gmai.data.sources import parquet, remote
from megatron_gmai.data.sources.mixture import Source
from megatron_gmai.data.text.conversation import image_names, parse_conversation

MAX_IMAGE_BYTES = 500_000_000
JPEG_MAGIC = b"\xff\xd8\xff"
SCAN = re.compile(b"\xff\xda")
END = re.compile(b"\xff\xd9")  # three times as fast as bytes.find
FEW_SCANS = 20  # more than the usual progressive JPEG has


class Located(NamedTuple):
    """An image file that was found, and a text that changes when the file does."""

    path: str
    size: int  # bytes
    state: str


def check_record(
    record: Any, source: Source, located: Mapping[str, Located] = MappingProxyType({})
) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """The record and its image files (suffix, bytes), all found usable. `located` are those of its
    images that were looked for already. Raises BadSample."""
    names = image_names(record) if isinstance(record, dict) else []
    files: list[bytes] = []
    size = 0
    for name in names:
        check_size(len(names), size)
        files.append(read_image(name, source, located.get(name)))
        size += len(files[-1])
    pages = [1] * len(files)
    if not all(data.startswith(JPEG_MAGIC) for data in files):  # a JPEG has no pages
        record, files, pages = take_pages(record, files, source.tiff_pages, source.nifti_slices)
    parse_conversation(record, len(files))
    names = [name for name, count in zip(names, pages, strict=True) for _ in range(count)]
    return record, [_checked_image(data, name) for data, name in zip(files, names, strict=True)]


def read_image(name: str, source: Source, located: Located | None = None) -> bytes:
    """The bytes of an image file, wherever the data set has its images. Raises BadSample."""
    if source.embedded_images is not None:
        data = parquet.read_embedded(source.embedded_images, name, MAX_IMAGE_BYTES)
        if data is not None:
            return data
    if source.image_url is not None:
        return remote.read_below(source.image_url, name, MAX_IMAGE_BYTES)
    file = located or locate(name, source)
    if file.size > MAX_IMAGE_BYTES:
        raise BadSample(f"image {name}: larger than {MAX_IMAGE_BYTES} bytes", name)
    try:
        handle = os.open(file.path, os.O_RDONLY)
        try:
            return os.read(handle, file.size)  # one call: system calls are what reading costs
        finally:
            os.close(handle)
    except OSError as error:
        raise BadSample(f"image {name}: {error.strerror}", name) from error


def locate_images(record: Any, source: Source) -> tuple[int, list[str], dict[str, Located]]:
    """Bytes of a record's images, a text for each that changes when the image does, and the files
    that were found. Of an image behind a URL or in a Parquet file, its name has to do."""
    try:
        names = image_names(record) if isinstance(record, dict) else []
    except BadSample:
        return 0, [], {}
    if source.image_url is not None:
        return 0, [], {}
    located: dict[str, Located] = {}
    size, states = 0, []
    for name in names:
        embedded = parquet.embedded_size(name) if source.embedded_images is not None else None
        if embedded is not None:
            size += embedded
            continue
        try:
            file = located[name] = locate(name, source)
        except (BadSample, OSError):
            states.append("missing")
        else:
            size += file.size
            states.append(file.state)
    return size, states, located


def locate(name: str, source: Source) -> Located:
    """The image file below one of the data set's folders.

    Raises BadSample if there is none, or if the name leads out of its folder by `..`, an absolute
    path or a link, and not into a folder that the user allows.
    """
    if "\0" in name:
        raise BadSample("the image name holds a null character")
    problem = "no such file"
    for base in source.real_roots:
        try:
            found = _find(name if name.startswith("/") else f"{base}/{name}")
        except PermissionError:
            problem = "no permission to look for it"
            continue
        if found is None:
            continue
        path, status = found
        if not stat.S_ISREG(status.st_mode):
            kind = "folder" if stat.S_ISDIR(status.st_mode) else "pipe or device"
            problem = f"a {kind}, not a file,"
            continue
        if not path.startswith(base + "/") and not _is_allowed(path, base, source):
            raise BadSample(
                f"image {name}: outside of its folder {base}, in {os.path.dirname(path)}; "
                "--image-root FOLDER allows a folder for absolute names and links",
                name,
            )
        # Who may read it counts, so that an image which nobody could read gets another chance.
        state = f"{status.st_size} {status.st_mtime_ns} {status.st_mode:o} {status.st_uid}"
        return Located(path, status.st_size, state)
    roots = " or ".join(str(root) for root in source.image_roots)
    raise BadSample(f"image {name}: {problem} in {roots}{_other_spelling(name, source)}", name)


def _other_spelling(name: str, source: Source) -> str:
    """macOS takes letters with accents apart, so that two names look alike and are not."""
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, name)
        if other != name and any(os.path.lexists(f"{root}/{other}") for root in source.real_roots):
            return f"; the file's name is there in Unicode's form {form}, which is another name"
    return ""


def _find(path: str) -> tuple[str, os.stat_result] | None:
    """Path without links and status of what is there; `os.path.realpath`, but with one system call
    where many files lie in one folder. None if there is nothing. Raises PermissionError."""
    folder, _, base = path.rpartition("/")
    try:
        if base in ("", ".", ".."):
            path = os.path.realpath(path)
        else:
            path = f"{_real(folder or '/').rstrip('/')}/{base}"
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            path = os.path.realpath(path)
            status = os.stat(path)
    except PermissionError:
        raise
    except (OSError, ValueError):
        return None
    return path, status


@lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _is_allowed(path: str, base: str, source: Source) -> bool:
    """Whether links and absolute names may lead there."""
    if source.allowed_root is not None:
        allowed = _real(str(source.allowed_root))
        if path.startswith(allowed.rstrip("/") + "/"):
            return True
    # The cache of Hugging Face: each file of `snapshots/VERSION` is a link into `blobs`.
    repository, snapshots, _ = base.rpartition("/snapshots/")
    return bool(snapshots) and path.startswith(f"{repository}/blobs/")


def _checked_image(data: bytes, name: str) -> tuple[str, bytes]:
    """Suffix and bytes for the shard: decoded once to see that it can be, without metadata."""
    try:
        small = _small_jpeg(data)
        if small is None:
            return stored_image(data)
        if _is_bare_jpeg(data):
            return "jpg", data
        suffix, bare = strip_metadata(data)
        return (suffix, bare) if _is_same(_small_jpeg(bare), small) else stored_image(data)
    except BadSample as error:
        raise BadSample(f"image {name}: {error}", name) from error


def _small_jpeg(data: bytes) -> np.ndarray | None:
    """Grey values of a JPEG at an eighth of its size: all of its bits are read, and little else is
    done. None for all files that are left to `decode`. Raises BadSample if data are damaged."""
    if not data.startswith(JPEG_MAGIC) or sum(1 for _ in SCAN.finditer(data)) > FEW_SCANS:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # its own error for headers it does not know
        return None
    if colours not in ("YCbCr", "Gray"):
        return None
    check_sides(width, height)
    try:
        return simplejpeg.decode_jpeg(data, "GRAY", True, True, 1, 1, strict=True)
    except ValueError as error:
        if "extraneous bytes" in str(error):  # padding between segments: all pixels are there
            return None
        raise BadSample(f"cannot decode: {error}") from error


def _is_bare_jpeg(data: bytes) -> bool:
    """Whether there is nothing to strip: no text among the segments, nothing behind the picture."""
    offset = 2
    while offset + 4 <= len(data) and data[offset] == 0xFF and data[offset + 1] not in JPEG_TEXTS:
        if data[offset + 1] == 0xDA:
            end = END.search(data, offset)
            return end is not None and end.end() == len(data)
        offset += 2 + data[offset + 2] * 256 + data[offset + 3]
    return False


def _is_same(pixels: np.ndarray | None, others: np.ndarray) -> bool:
    return pixels is not None and np.array_equal(pixels, others)
