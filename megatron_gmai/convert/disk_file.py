"""A large file that goes to the disk while it is still being written."""

import os
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

_FLUSHED_AT_ONCE = 1 << 27  # bytes
# Bytes of a write. The kernel takes as large a part of its memory at once; where that has to be
# fetched from a virtual machine's host first, megabytes take ten times as long.
_WRITTEN_AT_ONCE = 1 << 16


class DiskFile:
    """A new file for writing; when it is closed, its bytes are on the disk itself.

    The kernel would keep gigabytes in memory and leave the disk idle until the last `fsync`, so a
    thread asks for them every so often. Another one sums the bytes that are being written, which
    saves reading them again; `crc32` is their CRC-32 so far.
    """

    def __init__(self, path: Path, summed: bool = False) -> None:
        self.path, self.crc32, self._summed = path, 0, summed
        self._file = path.open("wb")
        self._threads = ThreadPoolExecutor(2)
        self._flush: Future[None] | None = None
        self._waiting = 0  # bytes that no flush was asked for

    def write(self, data: bytes | memoryview) -> int:
        """As of any file; raises OSError, of an earlier flush too."""
        summing = self._threads.submit(zlib.crc32, data, self.crc32) if self._summed else None
        try:
            count = sum(map(self._file.write, _blocks(data)))
        finally:  # the caller may reuse the memory
            self.crc32 = summing.result() if summing else 0
        self._waiting += count
        if self._waiting >= _FLUSHED_AT_ONCE and (self._flush is None or self._flush.done()):
            self._finish_flush()
            self._file.flush()
            self._flush = self._threads.submit(os.fdatasync, self._file.fileno())
            self._waiting = 0
        return count

    def tell(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def flush(self) -> None:
        """Hand all bytes to the kernel; `torch.save` asks for it."""
        self._file.flush()

    def close(self) -> None:
        """Wait until all bytes are on the disk. Raises OSError where they are not."""
        try:
            self._finish_flush()
            self._file.flush()
            os.fsync(self._file.fileno())
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
        self._threads.shutdown()
        self._file.close()

    def _finish_flush(self) -> None:
        if self._flush is not None:
            self._flush.result()


def _blocks(data: bytes | memoryview) -> Iterator[memoryview]:
    view = memoryview(data).cast("B")
    return (view[at : at + _WRITTEN_AT_ONCE] for at in range(0, len(view), _WRITTEN_AT_ONCE))
