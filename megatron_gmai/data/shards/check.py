"""One annotation record and its images, checked before they go into a shard."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from megatron_gmai.data.images.jpeg import check_scans
from megatron_gmai.data.images.pages import take_pages
from megatron_gmai.data.images.privacy import stored_image, strip_metadata
from megatron_gmai.data.images.sizes import check_size
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.sources import parquet, remote
from megatron_gmai.data.sources.mixture import Source
from megatron_gmai.data.text.conversation import image_names, parse_conversation

MAX_IMAGE_BYTES = 500_000_000
JPEG_MAGIC = b"\xff\xd8\xff"
SURE_SIDE = 4096  # pixels; a square of it is below every limit of `decode`


def check_record(record: Any, source: Source) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """The record and its image files (suffix, bytes), all found usable. Raises BadSample."""
    names = image_names(record) if isinstance(record, dict) else []
    files = [read_image(name, source) for name in names]
    pages = [1] * len(files)
    if files:
        record, files, pages = take_pages(record, files, source.tiff_pages, source.nifti_slices)
    parse_conversation(record, len(files))
    names = [name for name, count in zip(names, pages, strict=True) for _ in range(count)]
    return record, [_checked_image(data, name) for data, name in zip(files, names, strict=True)]


def read_image(name: str, source: Source) -> bytes:
    """The bytes of an image file, wherever the data set has its images. Raises BadSample."""
    if source.embedded_images is not None:
        data = parquet.read_embedded(source.embedded_images, name, MAX_IMAGE_BYTES)
        if data is not None:
            return data
    if source.image_url is not None:
        return remote.read_below(source.image_url, name, MAX_IMAGE_BYTES)
    path = find_image(name, source)
    try:
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size > MAX_IMAGE_BYTES:
                raise BadSample(f"image {name}: larger than {MAX_IMAGE_BYTES} bytes", name)
            return file.read()
    except OSError as error:
        raise BadSample(f"image {name}: {error.strerror}", name) from error


def image_state(name: str, source: Source) -> tuple[int, str]:
    """Size in bytes of an image file, and a text that changes when the file does. An image behind a
    URL is not asked for: its place has to do."""
    if source.image_url is not None:
        return 0, source.image_url
    embedded = parquet.embedded_size(name) if source.embedded_images is not None else None
    if embedded is not None:
        return embedded, ""
    try:
        status = os.stat(find_image(name, source))
    except (BadSample, OSError):
        return 0, "missing"
    return status.st_size, f"{status.st_size} {status.st_mtime_ns}"


def find_image(name: str, source: Source) -> str:
    """The image file below one of the data set's folders.

    Raises BadSample if there is none, or if the name leads out of its folder by `..`, an absolute
    path or a link, and not into a folder that the user allows.
    """
    if "\0" in name:
        raise BadSample("the image name holds a null character")
    for root in source.image_roots:
        base = _real(str(root))
        path = _resolved(os.path.join(base, name))
        if not os.path.isfile(path):
            continue
        if not any(_is_below(path, allowed) for allowed in (base, *_allowed(base, source))):
            raise BadSample(
                f"image {name}: outside of its folder {root}, in {os.path.dirname(path)}; "
                "--image-root FOLDER allows a folder for absolute names and links",
                name,
            )
        return path
    roots = " or ".join(str(root) for root in source.image_roots)
    raise BadSample(f"image {name}: no such file in {roots}", name)


@lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _resolved(path: str) -> str:
    """`os.path.realpath`, ten times faster where many files lie in one folder."""
    folder, base = os.path.split(path)
    if base in ("", ".", ".."):
        return os.path.realpath(path)
    path = os.path.join(_real(folder), base)
    return os.path.realpath(path) if os.path.islink(path) else path


def _allowed(base: str, source: Source) -> list[str]:
    """Folders that links and absolute names may lead to."""
    allowed = [] if source.allowed_root is None else [_real(str(source.allowed_root))]
    parts = Path(base).parts
    if "snapshots" in parts:  # the cache of Hugging Face: each file is a link into `blobs`
        place = len(parts) - 1 - parts[::-1].index("snapshots")
        allowed.append(str(Path(*parts[:place], "blobs")))
    return allowed


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def _checked_image(data: bytes, name: str) -> tuple[str, bytes]:
    """Suffix and bytes for the shard: decoded once to see that it can be, without metadata."""
    try:
        small = _small_jpeg(data) if data.startswith(JPEG_MAGIC) else None
        if small is None:
            return stored_image(data)
        suffix, bare = strip_metadata(data)
        if bare == data or _is_same(_small_jpeg(bare), small):
            return suffix, bare
        return stored_image(data)
    except BadSample as error:
        raise BadSample(f"image {name}: {error}", name) from error


def _small_jpeg(data: bytes) -> np.ndarray | None:
    """A JPEG at an eighth of its size: all of its bits are read, and little else is done.

    None for the kinds that are left to `decode`. Raises BadSample if data are missing or damaged.
    """
    check_scans(data)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # its own error for headers it does not know
        return None
    if colours not in ("YCbCr", "Gray"):
        return None
    if max(height, width) > SURE_SIDE:
        check_size(width, height)
    try:
        return simplejpeg.decode_jpeg(data, "GRAY", True, True, 1, 1, strict=True)
    except ValueError as error:
        if "extraneous bytes" in str(error):  # padding between segments: all pixels are there
            return None
        raise BadSample(f"cannot decode: {error}") from error


def _is_same(pixels: np.ndarray | None, others: np.ndarray) -> bool:
    return pixels is not None and np.array_equal(pixels, others)
