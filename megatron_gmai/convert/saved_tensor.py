"""A tensor as `torch.save` wrote it: a zip archive that lies somewhere in a file.

The archive keeps a CRC-32 of each of its parts. torch.load compares none of them; here all are, so
a bit that has changed on the disk is told instead of becoming a weight.
"""

import io
import zipfile
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor

from megatron_gmai.convert.memory import new_tensor

_BLOCK = 1 << 20  # bytes at a time, which stay in the cache for their checksum and their copy


def read_saved(file: BinaryIO, start: int, length: int) -> Tensor:
    """The tensor whose archive is the `length` bytes from `start`.

    Raises any type of exception where they are something else, or a checksum does not fit: torch
    does. Loading never runs code of the file.
    """
    window = _Window(file, start, length)
    tensor = torch.load(window, map_location="meta", weights_only=True)  # type: ignore[arg-type]
    if not isinstance(tensor, Tensor):
        raise ValueError("it is no tensor")
    with zipfile.ZipFile(window) as archive:
        for part in archive.infolist():
            with archive.open(part) as source:
                if part.filename.endswith("/data/0"):  # all other parts are a few bytes each
                    memory = _read(source, part.file_size)
                else:
                    source.read()
    values = memory.view(tensor.dtype)
    return values.as_strided(tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _read(source: IO[bytes], size: int) -> Tensor:
    """All bytes of a part; its end is where zipfile compares the checksum."""
    memory = new_tensor((size,), torch.uint8)
    target, done = memory.numpy().data, 0
    while block := source.read(_BLOCK):
        target[done : done + len(block)] = block
        done += len(block)
    if done != size:
        raise ValueError(f"{done} of {size} bytes are there")
    return memory


class _Window(io.RawIOBase):
    """Some bytes of a file as a file of their own. torch has one (`_ReaderView`), which seeks the
    wrong way from the end, where zipfile looks for a table of contents."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._length)[whence])
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._position)
        self._file.seek(self._start + self._position)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data

    def readinto(self, target: Any) -> int:
        data = self.read(len(target))
        target[: len(data)] = data
        return len(data)
