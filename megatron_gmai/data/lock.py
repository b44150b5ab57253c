"""One builder a folder: others wait for it, and say for whom.

The lock is the operating system's, so it goes with its holder, however that ends. The holder writes
who it is and how far it has come into the lock's file, and touches the file while it lives.
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LOCK_FILE = ".build.lock"
BEAT_S = 5.0  # the holder touches the file so often
POLL_S = 0.5
MESSAGE_S = 30.0  # between two messages of one who waits
Log = Callable[[str], None]


class Holder:
    """What the holder of a lock tells those who wait."""

    def __init__(self, handle: int | None) -> None:
        self._handle = handle
        self.name = f"process {os.getpid()} on {socket.gethostname()}"

    def tell(self, progress: str) -> None:
        self._write(f"{self.name}: {progress}\n".encode())

    def end(self) -> None:
        self._write(b"")

    def _write(self, line: bytes) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, 0)
                os.pwrite(self._handle, line, 0)


def is_read_only(folder: Path) -> bool:
    """Whether the folder is there and cannot be written to."""
    return folder.is_dir() and not os.access(folder, os.W_OK)


@contextlib.contextmanager
def building(folder: Path, log: Log) -> Iterator[Holder]:
    """Holds the folder's lock, after waiting for another holder with a message now and then.

    A folder that cannot be written to has no lock and needs none: nobody builds there. Raises
    ValueError for a lock that is no file.
    """
    if is_read_only(folder):
        yield Holder(None)
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK_FILE
    handle = open_lock(file)
    try:
        _acquire(handle, file, log)
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(handle, ended), daemon=True)
        beat.start()
        holder = Holder(handle)
        holder.tell("begins")
        try:
            yield holder
        finally:
            ended.set()
            beat.join()
            holder.end()
    finally:
        os.close(handle)


def open_lock(file: Path) -> int:
    """A lock's file, made if it is not there.

    Strangers' folders are indexed too: a link would have us write to whatever it names, and a pipe
    would wait for ever. Raises ValueError for these.
    """
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{file} is a link; delete it") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{file} is no file; delete it")
    return handle


def _acquire(handle: int, file: Path, log: Log) -> None:
    last = 0.0
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not last or time.monotonic() - last > MESSAGE_S:
                last = time.monotonic()
                log(f"waiting for another builder of {file.parent}: {read_holder(file.parent)}")
            time.sleep(POLL_S)
        except OSError as error:
            log(f"{file.parent} cannot be locked ({error.strerror}): start no second builder of it")
            return


def _beat(handle: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(handle)


def read_holder(folder: Path) -> str:
    """Who builds in the folder and how far it is, as far as one can know."""
    with contextlib.suppress(OSError):
        return (folder / LOCK_FILE).read_text().strip() or "not known yet"
    return "not known yet"
