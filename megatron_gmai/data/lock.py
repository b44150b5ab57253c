"""One builder a folder: others wait for it, and say for whom.

The lock is the operating system's, so it goes with its holder, however that ends. The holder writes
who it is and how far it has come into the lock's file, and touches the file while it lives.
"""

import contextlib
import fcntl
import os
import socket
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

    def __init__(self, file: Path) -> None:
        self._file = file
        self.name = f"process {os.getpid()} on {socket.gethostname()}"

    def tell(self, progress: str) -> None:
        with contextlib.suppress(OSError):
            self._file.write_text(f"{self.name}: {progress}\n")


@contextlib.contextmanager
def building(folder: Path, log: Log) -> Iterator[Holder]:
    """Holds the folder's lock, after waiting for another holder with a message now and then."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK_FILE
    with file.open("a") as handle:
        _acquire(handle.fileno(), file, log)
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(file, ended), daemon=True)
        beat.start()
        holder = Holder(file)
        holder.tell("begins")
        try:
            yield holder
        finally:
            ended.set()
            beat.join()
            file.write_text("")


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


def _beat(file: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(file)


def read_holder(folder: Path) -> str:
    """Who builds in the folder and how far it is, as far as one can know."""
    with contextlib.suppress(OSError):
        return (folder / LOCK_FILE).read_text().strip() or "not known yet"
    return "not known yet"
