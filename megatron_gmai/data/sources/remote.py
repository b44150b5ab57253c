"""Files behind URLs that fsspec understands (`s3://`, `gs://`, `hf://`, `memory://`, ...).

Local paths never come here. What a scheme needs to log in is fsspec's and the scheme's business:
environment variables and configuration files.
"""

import posixpath
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from megatron_gmai.data.ledger import BadSample

MOST_REASON = 200  # characters of what a server says


def is_url(address: object) -> bool:
    """Whether a name is a URL and not a path."""
    return isinstance(address, str) and "://" in address


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it. Raises ValueError with the remedy if the scheme is
    unknown or its package is missing."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open {url}: {error}") from error


def list_files(url: str, suffixes: Sequence[str]) -> list[str]:
    """The URL itself if it is a file, else all files below it that end like one of `suffixes`.

    Raises ValueError if there is nothing.
    """
    files, path = filesystem(url)
    try:
        if files.isfile(path):
            return [url]
        found = sorted(name for name in files.find(path) if name.lower().endswith(tuple(suffixes)))
    except Exception as error:
        raise ValueError(f"cannot read {url}: {error}") from error
    if not found:
        raise ValueError(f"{url} is no file, and holds no {' or '.join(suffixes)} file")
    return [files.unstrip_protocol(name) for name in found]


def version(url: str) -> str:
    """Name, size and what else the store says about the version of a file."""
    files, path = filesystem(url)
    try:
        info = files.info(path)
    except Exception as error:
        raise ValueError(f"cannot read {url}: {error}") from error
    marks = [str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified") if key in info]
    return " ".join([posixpath.basename(path), str(info.get("size")), *marks])


def copy(url: str, target: str) -> None:
    """Copies a file to a local path. Raises ValueError if that cannot be done."""
    files, path = filesystem(url)
    try:
        files.get_file(path, target)
    except Exception as error:
        raise ValueError(f"cannot copy {url}: {error}") from error


def read_below(url: str, name: str, most: int) -> bytes:
    """A file below a folder. Raises BadSample if there is none, if it is larger than `most` bytes,
    or if its name leads out of the folder."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or is_url(name):
        raise BadSample(f"image {name}: outside of its folder {url}", name)
    files, path = filesystem(url)
    file = posixpath.join(path, name)
    try:
        size = files.size(file)
        data = _read_some(files, file, most + 1) if size is None else None
        if max(size or 0, len(data or b"")) > most:
            raise BadSample(f"image {name}: larger than {most} bytes")
        return files.cat_file(file) if data is None else data
    except BadSample:
        raise
    except Exception as error:  # each scheme has its own kinds
        cause = error.__cause__ or error  # HTTP calls all of its errors "not found"
        if isinstance(cause, FileNotFoundError):
            raise BadSample(f"image {name}: no such file in {url}", name) from error
        reason = " ".join(str(cause).split())[:MOST_REASON] or type(cause).__name__
        raise BadSample(f"image {name}: cannot be read from {url}: {reason}", name) from error


def _read_some(files: Any, file: str, most: int) -> bytes:
    """At most so many bytes of a file whose size the server does not tell."""
    parts, size = [], 0
    with files.open(file, "rb") as stream:
        while size < most and (part := stream.read(min(2**20, most - size))):
            parts.append(part)
            size += len(part)
    return b"".join(parts)
