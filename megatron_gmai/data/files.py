"""Files and lines that are written whole or not at all."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Writes under a name of this process alone, then renames: readers see all or nothing."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


class Lines:
    """Appends lines to a file. On a full disk they wait in memory for the next time: what a run
    tells about itself must not end it."""

    def __init__(self, path: Path) -> None:
        self.path, self._waiting, self._is_warned = path, "", False

    def add(self, lines: Iterable[str]) -> None:
        """Append `lines`, each with its newline, behind those that wait; all of them or none."""
        self._waiting += "".join(lines)
        if not self._waiting:
            return
        try:
            _append(self.path, self._waiting.encode())
        except OSError as error:
            if not self._is_warned:
                print(f"warning: {self.path}: {error}; its lines wait in memory", flush=True)
            self._is_warned = True
            return
        self._waiting, self._is_warned = "", False


def _append(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) != len(data):  # a disk that fills up takes a part
                raise OSError("no space left for a whole line")
        except OSError:
            with suppress(OSError):  # the first error is the one to tell
                file.truncate(end)
            raise
