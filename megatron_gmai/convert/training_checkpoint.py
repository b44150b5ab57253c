"""Writes a training checkpoint tensor by tensor, without a model or a process group.

The folder is one that training itself could have written after no step (see
`training/checkpoint.py`): torch's distributed format under canonical names, a manifest, `latest`.
torch's own writer (`torch.distributed.checkpoint.save`) keeps every tensor until the end.
"""

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from megatron_gmai.convert.disk_file import DiskFile
from megatron_gmai.convert.manifest import LATEST, write_manifest
from megatron_gmai.convert.output import Advance, new_folder, not_counted, sync
from megatron_gmai.convert.read_ahead import read_ahead

_MAX_FILE_BYTES = 4 * 10**9


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
    with new_folder(folder, needed_bytes) as partial:
        checkpoint = partial / "iter_0000000"
        checkpoint.mkdir()
        writer = _Writer(checkpoint, advance)
        try:
            for name, tensor in read_ahead(_stored(weights, dtype)):
                writer.write(name, tensor)
            writer.finish()
        finally:
            writer.abandon()
        write_carried(checkpoint, carried)
        position = {"iteration": 0, "consumed_packs": 0, "optimizer_steps": 0, "bookmark": None}
        write_manifest(checkpoint, position, config, False, writer.checksums)
        for path in checkpoint.iterdir():
            sync(path)
        sync(checkpoint)
        (partial / LATEST).write_text(checkpoint.name, encoding="utf-8")


def _stored(
    weights: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as the checkpoint holds them."""
    for name in weights:
        tensor = weights[name].detach().cpu()
        yield name, _alone((tensor if dtype is None else tensor.to(dtype)).contiguous())


def _alone(tensor: Tensor) -> Tensor:
    """The same memory as a storage of its own: torch.save writes all of a tensor's storage, which
    for a tensor of a mapped file is the file."""
    values = tensor.flatten().view(torch.uint8).numpy()
    return torch.from_numpy(values).view(tensor.dtype).view(tensor.shape)


@contextmanager
def _reason_of_torch() -> Iterator[None]:
    """A file that cannot be written (a full disk) is told as such: torch puts a complaint about
    positions in the zip above the OSError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class _Writer:
    """Appends tensors to `*.distcp` files and keeps the table of where each of them lies."""

    def __init__(self, folder: Path, advance: Advance) -> None:
        self._folder, self._advance = folder, advance
        self._tensors: dict[str, Any] = {}
        self._spans: dict[MetadataIndex, Any] = {}
        self.checksums: dict[str, int] = {}  # CRC-32 by the name of each file that is finished
        self._file = self._next_file()

    def write(self, name: str, tensor: Tensor) -> None:
        if self._file.tell() and self._file.tell() + tensor.nbytes > _MAX_FILE_BYTES:
            self._close()
            self._file = self._next_file()
        start, offsets = self._file.tell(), torch.Size([0] * tensor.dim())
        with _reason_of_torch():
            torch.save(tensor, self._file)  # type: ignore[arg-type]  # all that it asks of a file
        length = self._file.tell() - start
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
        self.checksums[self._file.path.name] = self._file.crc32

    def _next_file(self) -> DiskFile:
        name = f"__0_{len(self.checksums)}.distcp"
        return DiskFile(self._folder / name, summed=True)
