"""A tensor as `torch.save` wrote it: a zip archive that lies somewhere in a file.

The archive keeps a CRC-32 of each of its parts. torch.load compares none of them; here all are, so
a bit that has changed on the disk is told instead of becoming a weight.
"""

import io
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_gmai.convert.memory import ReusedMemory, aligned, mapped

# The header before a part's bytes (APPNOTE 4.3.7): 30 bytes, which end with the lengths of the name
# and of the extra field that come next.
_HEADER, _LENGTHS_AT = 30, 26


def read_saved(path: Path, start: int, length: int, memory: ReusedMemory) -> Tensor:
    """The tensor whose archive is the `length` bytes from `start` of a file.

    Its numbers stay in the file, mapped for as long as they are in use, if they lie there as in
    memory; else they are copied to `memory`.

    Raises any type of exception where they are something else, or a checksum does not fit: torch
    does. Loading never runs code of the file.
    """
    content = np.empty(0, np.uint8)
    with path.open("rb") as file:
        if start + length > os.fstat(file.fileno()).st_size:
            raise ValueError("it ends after the end of the file")
        window = _Window(file, start, length)
        with zipfile.ZipFile(window) as archive:
            # Compressed or overlapping parts could fill all memory, or take for ever.
            if sum(part.file_size for part in archive.infolist()) > length:
                raise ValueError("its parts are larger than all of it")
            for part in archive.infolist():
                if part.filename.endswith("/data/0"):  # all other parts are a few bytes each
                    place = start + _place(window, part)
                    content = mapped(path, place, part.file_size)
                    if zlib.crc32(content.data) != part.CRC:
                        raise ValueError(f"Bad CRC-32 for file {part.filename!r}")
                else:
                    archive.read(part)
        window.seek(0)
        try:
            tensor = torch.load(window, map_location="meta", weights_only=True)  # type: ignore[arg-type]
        except pickle.UnpicklingError as error:  # torch tells how to load it all the same
            raise ValueError("it is no tensor") from error
    if not isinstance(tensor, Tensor):
        raise ValueError("it is no tensor")
    if tensor.nbytes > content.nbytes:  # strides of 0 could spell one that fills all memory
        raise ValueError("it does not hold every number")
    values = aligned(content, tensor.dtype, memory)
    return values.as_strided(tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _place(window: "_Window", part: zipfile.ZipInfo) -> int:
    """Where the bytes of a part begin. zipfile would read them, and copy them three times."""
    window.seek(part.header_offset + _LENGTHS_AT)
    place = part.header_offset + _HEADER + sum(struct.unpack("<HH", window.read(4)))
    if part.compress_type != zipfile.ZIP_STORED or place + part.file_size > window.length:
        raise ValueError(f"{part.filename} is no plain part of this file")
    return place


class _Window(io.RawIOBase):
    """Some bytes of a file as a file of their own. torch has one (`_ReaderView`), which seeks the
    wrong way from the end, where zipfile looks for a table of contents."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self.length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self.length)[whence])
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.length - self._position)
        data = bytearray(left if size is None or size < 0 else min(size, left))
        return bytes(data[: self.readinto(data)])

    def readinto(self, target: Any) -> int:
        count = min(len(target), max(0, self.length - self._position))
        self._file.seek(self._start + self._position)
        done = self._file.readinto(memoryview(target)[:count])
        self._position += done
        return done
