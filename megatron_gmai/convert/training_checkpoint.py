"""Writes a training checkpoint tensor by tensor, without a model or a process group.

The folder is one that training itself could have written after no step (see
`training/checkpoint.py`): torch's distributed format under canonical names, a manifest, `latest`.
torch's own writer (`torch.distributed.checkpoint.save`) keeps every tensor until the end.
"""

import pickle
import struct
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_gmai.config import Config
from megatron_gmai.convert.carried import write_carried
from megatron_gmai.convert.crc32 import joined
from megatron_gmai.convert.disk_file import DiskFile
from megatron_gmai.convert.files import cast
from megatron_gmai.convert.manifest import LATEST, write_manifest
from megatron_gmai.convert.output import Advance, new_folder, not_counted, sync
from megatron_gmai.convert.read_ahead import read_ahead

_MAX_FILE_BYTES = 4 * 10**9
# Of an archive's start, in bytes. torch puts the content at a multiple of it inside the archive, so
# that readers can use it where it lies in the file.
_ALIGNMENT = 64


def write_training_checkpoint(
    folder: Path,
    config: Config,
    weights: Mapping[str, Tensor],
    carried: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    needed_bytes: int = 0,
    advance: Advance = not_counted,
) -> None:
    """Write `folder`, a new folder of checkpoints that holds one: `--load` starts from it.

    Args:
        config: of the run that would have written it; its model sizes fit the weights.
        weights: canonical name to whole tensor, each asked for once.
        carried: the parts of CLIP that never run.
        dtype: of every tensor; None keeps each as it is.
        needed_bytes: free space without which nothing is begun.

    Raises:
        ValueError, OSError: as `new_folder`, and what reading a weight raises.
    """
    with new_folder(folder, needed_bytes) as unfinished:
        checkpoint = unfinished / "iter_0000000"
        checkpoint.mkdir()
        writer = _Writer(checkpoint, advance)
        try:
            makers = (partial(_stored, weights, name, dtype) for name in weights)
            with closing(read_ahead(makers)) as ahead:
                for stored in ahead:
                    writer.write(*stored)
                    del stored  # before the next one is waited for
            writer.finish()
        finally:
            writer.abandon()
        write_carried(checkpoint, carried)
        position = {"iteration": 0, "consumed_packs": 0, "optimizer_steps": 0, "bookmark": None}
        write_manifest(checkpoint, position, config, False, writer.checksums)
        for path in checkpoint.iterdir():
            sync(path)
        sync(checkpoint)
        (unfinished / LATEST).write_text(checkpoint.name, encoding="utf-8")


def _stored(
    weights: Mapping[str, Tensor], name: str, dtype: torch.dtype | None
) -> tuple[str, Tensor, list["_Piece"]]:
    """A tensor's name, the tensor as the checkpoint holds it, and the archive of it."""
    tensor = weights[name].detach().cpu()
    tensor = _alone((tensor if dtype is None else cast(name, tensor, dtype)).contiguous())
    return name, tensor, _archive(tensor)


def _alone(tensor: Tensor) -> Tensor:
    """The same memory as a storage of its own: torch.save writes all of a tensor's storage, which
    for a tensor of a mapped file is the file."""
    values = tensor.flatten().view(torch.uint8).numpy()
    return torch.from_numpy(values).view(tensor.dtype).view(tensor.shape)


@dataclass(frozen=True)
class _Piece:
    """Bytes of an archive and their CRC-32."""

    data: memoryview
    crc32: int


def _archive(tensor: Tensor) -> list[_Piece]:
    """What `torch.save` writes: the tensor's own memory, and copies of the bytes around it."""
    content = tensor.flatten().view(torch.uint8).numpy()
    written = _Written(content.ctypes.data)
    torch.save(tensor, written)  # type: ignore[arg-type]  # all that it asks of a file
    before, after = (b"".join(pieces) for pieces in (written.before, written.after))
    assert written.content_length == content.nbytes
    # torch has summed the content, and a zip's data descriptor says what it found (APPNOTE 4.3.9).
    signature, summed = struct.unpack_from("<4sI", after)
    content_crc32 = summed if signature == b"PK\x07\x08" else zlib.crc32(content.data)
    return [
        _Piece(memoryview(before), zlib.crc32(before)),
        _Piece(content.data, content_crc32),
        _Piece(memoryview(after), zlib.crc32(after)),
    ]


class _Written:
    """A file for torch: keeps all bytes but those at one address, whose number it keeps."""

    def __init__(self, address: int) -> None:
        self._address = address
        self.before: list[bytes] = []
        self.after: list[bytes] = []
        self.content_length = 0

    def write(self, data: memoryview) -> int:
        values = np.frombuffer(data, np.uint8)
        if values.ctypes.data == self._address:
            self.content_length = len(values)
        else:
            (self.after if self.content_length else self.before).append(values.tobytes())
        return len(values)

    def flush(self) -> None: ...


class _Writer:
    """Appends tensors to `*.distcp` files and keeps the table of where each of them lies."""

    def __init__(self, folder: Path, advance: Advance) -> None:
        self._folder, self._advance = folder, advance
        self._tensors: dict[str, Any] = {}
        self._spans: dict[MetadataIndex, Any] = {}
        self.checksums: dict[str, int] = {}  # CRC-32 by the name of each file that is finished
        self._crc32 = 0  # of the file so far
        self._file = self._next_file()

    def write(self, name: str, tensor: Tensor, archive: Sequence[_Piece]) -> None:
        length = sum(len(piece.data) for piece in archive)
        if self._file.tell() and self._file.tell() + length > _MAX_FILE_BYTES:
            self._close()
            self._file = self._next_file()
        gap = bytes(-self._file.tell() % _ALIGNMENT)
        for piece in (_Piece(memoryview(gap), zlib.crc32(gap)), *archive):
            self._file.write(piece.data)
            self._crc32 = joined(self._crc32, piece.crc32, len(piece.data))
        start, offsets = self._file.tell() - length, torch.Size([0] * tensor.dim())
        self._spans[MetadataIndex(name, offsets)] = _StorageInfo(
            self._file.path.name, start, length
        )
        self._tensors[name] = TensorStorageMetadata(
            TensorProperties.create_from_tensor(tensor),
            tensor.shape,
            [ChunkStorageMetadata(offsets, tensor.shape)],
        )
        self._advance(length)

    def finish(self) -> None:
        self._close()
        metadata = Metadata(self._tensors, storage_data=self._spans)
        (self._folder / ".metadata").write_bytes(pickle.dumps(metadata))

    def abandon(self) -> None:
        self._file.abandon()

    def _close(self) -> None:
        self._file.close()
        self.checksums[self._file.path.name] = self._crc32

    def _next_file(self) -> DiskFile:
        self._crc32 = 0
        return DiskFile(self._folder / f"__0_{len(self.checksums)}.distcp")
