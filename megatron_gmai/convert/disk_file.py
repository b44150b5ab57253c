"""A large new file that goes to the disk itself while its content is still being made."""

import errno
import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

_BLOCK = 1 << 12  # bytes; O_DIRECT asks that memory, place and length are multiples of it
_BUFFER = 1 << 23
_BUFFERS = 5  # one is filled while others are written
_THREADS = 2


class DiskFile:
    """A new file for writing; when it is closed, its bytes are on the disk.

    Where the file system can, they go past the kernel's page cache (O_DIRECT). There they would be
    copied into new memory, push out what other programs read, and leave the disk idle until the
    last `fsync`. They are gathered in buffers instead; threads write the full ones while the caller
    fills the next.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._is_direct = _set_direct(self._file, True)
        self._threads = ThreadPoolExecutor(_THREADS)
        # Mapped memory begins with a page. [_BUFFERS, _BUFFER]
        self._memory = np.frombuffer(mmap.mmap(-1, _BUFFERS * _BUFFER), np.uint8)
        self._memory = self._memory.reshape(_BUFFERS, _BUFFER)
        self._tasks: list[Future[None] | None] = [None] * _BUFFERS
        self._buffer = self._filled = 0  # which one is filled, and its bytes so far
        self._handed_over = 0  # bytes of the buffers before it

    def write(self, data: bytes | memoryview) -> int:
        """As of any file; raises OSError, of bytes that came earlier too."""
        values, at = np.frombuffer(data, np.uint8), 0
        while at < len(values):
            count = min(len(values) - at, _BUFFER - self._filled)
            target = self._memory[self._buffer, self._filled : self._filled + count]
            np.copyto(target, values[at : at + count])
            self._filled, at = self._filled + count, at + count
            if self._filled == _BUFFER:
                self._hand_over()
        return at

    def tell(self) -> int:
        """Bytes written so far."""
        return self._handed_over + self._filled

    def close(self) -> None:
        """Wait until all bytes are on the disk. Raises OSError where they are not."""
        try:
            size = self.tell()
            for _ in range(_BUFFERS):  # and so back to this one, with nothing left in any
                self._hand_over()
            os.ftruncate(self._file, size)  # the last block went out whole
            os.fsync(self._file)
        finally:
            self.abandon()

    def __enter__(self) -> "DiskFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: object, trace: TracebackType | None
    ) -> None:
        self.close() if kind is None else self.abandon()

    def abandon(self) -> None:
        """Close it without waiting for the disk."""
        if self._file >= 0:
            self._threads.shutdown(cancel_futures=True)
            os.close(self._file)
            self._file = -1

    def _hand_over(self) -> None:
        """Let a thread write the buffer; go on with the next when its bytes are written."""
        blocks = self._memory[self._buffer, : -(-self._filled // _BLOCK) * _BLOCK]
        task = self._threads.submit(self._put, blocks.data, self._handed_over)
        self._tasks[self._buffer] = task
        self._handed_over += self._filled
        self._buffer, self._filled = (self._buffer + 1) % _BUFFERS, 0
        if (earlier := self._tasks[self._buffer]) is not None:
            earlier.result()

    def _put(self, data: memoryview, at: int) -> None:
        done = 0
        while done < len(data):
            was_direct = self._is_direct  # the other thread may turn it off meanwhile
            try:
                done += os.pwrite(self._file, data[done:], at + done)
            except OSError as error:
                # Some file systems say only now that they cannot, or that their blocks are larger.
                if not was_direct or error.errno != errno.EINVAL:
                    raise
                self._is_direct = _set_direct(self._file, False)


def _set_direct(file: int, is_direct: bool) -> bool:
    """Turn O_DIRECT on or off; returns whether it is on now."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT * is_direct)
    except OSError:
        return False
    return is_direct
