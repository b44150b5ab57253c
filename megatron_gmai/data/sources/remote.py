"""Files behind URLs that fsspec understands (`s3://`, `gs://`, `hf://`, `memory://`, ...).

Local paths never come here. What a scheme needs to log in is fsspec's and the scheme's business:
environment variables and configuration files.

A store that says something about one file (it is not there, it is forbidden) is believed. A store
that cannot be reached says nothing about the data: it is asked again, and then the run ends.
"""

import posixpath
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeVar

from megatron_gmai.data.ledger import BadSample

T = TypeVar("T")
MOST_REASON = 200  # characters of what a server says
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # a minute: stores and switches restart in that time
# Errors about the file that was asked for. Those of a network are of every other kind there is.
OF_THE_FILE = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ValueError, TypeError, NotImplementedError, ImportError),
)
PASSING = (408, 425, 429)  # HTTP's time-out, too early, too many requests; and all from 500


class Outage(ValueError):
    """A store that could not be reached for long. It is no fault of any sample."""


def persistently(act: Callable[[], T], what: str) -> T:
    """The result of `act`, which is tried again, and told, after errors that may pass. Raises
    Outage if they do not, and errors that are about the file as they are."""
    for pause in (*PAUSES_S, None):
        try:
            return act()
        except Exception as error:
            if not _may_pass(cause_of(error)):
                raise
            if pause is None:
                raise Outage(
                    f"{what}: {reason_of(error)}, {len(PAUSES_S) + 1} times in "
                    f"{sum(PAUSES_S):.0f} s; when the store answers, the same command goes on"
                ) from error
            told = f"warning: {what}: {reason_of(error)}; trying again in {pause:.0f} s"
        print(told, file=sys.stderr, flush=True)
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def cause_of(error: Exception) -> BaseException:
    """What happened: fsspec's HTTP calls all of its errors "not found"."""
    return error.__cause__ or error if isinstance(error, FileNotFoundError) else error


def reason_of(error: Exception) -> str:
    """In one line."""
    cause = cause_of(error)
    return " ".join(str(cause).split())[:MOST_REASON] or type(cause).__name__


def _status(cause: BaseException) -> int:
    """HTTP's status, 0 where there is none: aiohttp and Google's store name it differently."""
    found = getattr(cause, "status", None) or getattr(cause, "code", None)
    return found if isinstance(found, int) else 0


def _may_pass(cause: BaseException) -> bool:
    if 400 <= _status(cause) < 500:
        return _status(cause) in PASSING
    return not isinstance(cause, OF_THE_FILE)


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
    # Not `isfile`, which takes a store that cannot be reached for one without the file.
    if _asked(lambda: files.info(path)["type"], url) == "file":
        return [url]
    below = _asked(lambda: files.find(path), url)
    found = sorted(name for name in below if name.lower().endswith(tuple(suffixes)))
    if not found:
        raise ValueError(f"{url} is no file, and holds no {' or '.join(suffixes)} file")
    return [files.unstrip_protocol(name) for name in found]


def _asked(act: Callable[[], T], url: str, doing: str = "read") -> T:
    """Raises ValueError, for whatever reason."""
    try:
        return persistently(act, f"cannot {doing} {url}")
    except Outage:
        raise
    except Exception as error:  # each scheme has its own kinds
        raise ValueError(f"cannot {doing} {url}: {error}") from error


def exists(url: str) -> bool:
    """Whether there is such a file. Raises ValueError where the store does not say."""
    files, path = filesystem(url)

    def look() -> bool:
        try:
            files.info(path)
        except Exception as error:
            if isinstance(cause_of(error), FileNotFoundError) or _status(cause_of(error)) == 404:
                return False
            raise
        return True

    return _asked(look, url)


def version(url: str) -> str:
    """Name, size and what else the store says about the version of a file."""
    files, path = filesystem(url)
    info = _asked(lambda: files.info(path), url)
    marks = [str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified") if key in info]
    return " ".join([posixpath.basename(path), str(info.get("size")), *marks])


def copy(url: str, target: str) -> None:
    """Copies a file to a local path. Raises ValueError if that cannot be done."""
    files, path = filesystem(url)
    _asked(lambda: files.get_file(path, target), url, "copy")


def read_span(url: str, start: int, size: int) -> bytes:
    """So many bytes of a file. Raises ValueError if they cannot be had."""
    files, path = filesystem(url)

    def read() -> bytes:
        data: bytes = files.cat_file(path, start, start + size)
        if len(data) > size:
            raise ValueError(
                f"{len(data)} bytes came for {size}: the server reads files whole only"
            )
        if len(data) < size:
            raise ConnectionError(f"{len(data)} of {size} bytes at {start} came")
        return data

    return _asked(read, url)


def read_below(url: str, name: str, most: int) -> bytes:
    """A file below a folder. Raises BadSample if there is none, if it is larger than `most` bytes,
    or if its name leads out of the folder; Outage."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or is_url(name):
        raise BadSample(f"image {name}: outside of its folder {url}", name)
    files, path = filesystem(url)
    file = posixpath.join(path, name)
    try:
        return persistently(lambda: _read_whole(files, file, most), f"cannot read {url}/{name}")
    except Outage:
        raise
    except _TooLarge as error:
        raise BadSample(f"image {name}: larger than {most} bytes", name) from error
    except Exception as error:  # each scheme has its own kinds
        cause = cause_of(error)
        if isinstance(cause, FileNotFoundError) or _status(cause) == 404:
            raise BadSample(f"image {name}: no such file in {url}", name) from error
        reason = reason_of(error)
        raise BadSample(f"image {name}: cannot be read from {url}: {reason}", name) from error


class _TooLarge(ValueError):
    pass


def _read_whole(files: Any, file: str, most: int) -> bytes:
    size = files.size(file)
    data = _read_some(files, file, most + 1) if size is None else None
    if max(size or 0, len(data or b"")) > most:
        raise _TooLarge
    return files.cat_file(file) if data is None else data


def _read_some(files: Any, file: str, most: int) -> bytes:
    """At most so many bytes of a file whose size the server does not tell."""
    parts, size = [], 0
    with files.open(file, "rb") as stream:
        while size < most and (part := stream.read(min(2**20, most - size))):
            parts.append(part)
            size += len(part)
    return b"".join(parts)
