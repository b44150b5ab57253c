"""A folder that appears under its name only when it is complete, and what it costs to write it."""

import errno
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Advance = Callable[[int], None]  # told the number of bytes just written


def not_counted(count: int) -> None:
    """An `Advance` for callers that show no progress."""


@contextmanager
def new_folder(folder: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yields a hidden folder beside `folder`, which takes its name when the block ends well.

    After any failure the hidden folder is removed. One that a killed process left behind is
    cleared by the next run, so starting again needs no cleaning up. A link is followed: the folder
    appears where it points.

    Raises:
        ValueError: `folder` exists and is not an empty folder, is a mount point or the working
            directory, another process is writing it, or the disk has no room for `needed_bytes`.
        OSError: writing failed; for a full disk the message says so.
    """
    folder = Path(os.path.realpath(folder))  # no folder can take the name of a link
    _refuse_contents(folder)
    if folder.is_mount() or folder == Path.cwd():  # a shell would stay in the old one
        kind = "a mount point" if folder.is_mount() else "the working directory"
        raise ValueError(f"{folder} is {kind}; choose a new folder inside it")
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    # The kernel drops this lock with the process, however it ends: no stale lock files.
    lock = os.open(partial, os.O_RDONLY)
    try:
        _lock(lock, partial, folder)
        try:
            _clear(partial)
            _check_room(partial, needed_bytes)
            yield partial
            _refuse_contents(folder)
            sync(partial)
            partial.replace(folder)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise OSError(
                    errno.ENOSPC, f"the disk filled up; nothing was kept of {folder}"
                ) from error
            raise
    finally:
        os.close(lock)
    sync(folder.absolute().parent)


def sync(path: Path) -> None:
    """Bring a file, or the list of names of a folder, to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refuse_contents(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and is not empty; choose another folder")


def _lock(lock: int, partial: Path, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The other process may have finished between our mkdir and our lock.
        ours = partial.exists() and os.path.samestat(os.fstat(lock), partial.stat())
    except BlockingIOError:
        ours = False
    if not ours:
        raise ValueError(f"another process is writing {folder}; wait for it or choose another")


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{needed / 1e9:.3g} GB are needed on the disk of {folder.parent.absolute()}, "
            f"{free / 1e9:.3g} GB are free; make room or choose another folder"
        )


class Progress:
    """A line every few seconds on standard error: bytes written, speed, time left."""

    INTERVAL_S = 3.0

    def __init__(self, total_bytes: int) -> None:
        self.total, self.done = total_bytes, 0
        self.start = self.last = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last < self.INTERVAL_S:
            return
        self.last = now
        speed = self.done / (now - self.start)
        left = max(self.total - self.done, 0) / speed
        print(
            f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB, {speed / 1e6:.0f} MB/s, "
            f"{left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
