"""The weights of a training checkpoint, read without Megatron and in any layout.

A checkpoint folder is torch's distributed format (`.metadata` and `*.distcp`); the model's tensors
are stored under their canonical names with the offsets of each rank's part, so torch alone can put
a whole tensor together.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_gmai.config import LoraConfig, ModelConfig
from megatron_gmai.convert.files import DTYPES, check_finite
from megatron_gmai.convert.memory import ReusedMemory
from megatron_gmai.convert.safe_metadata import CheckedReader
from megatron_gmai.convert.saved_tensor import read_saved
from megatron_gmai.weights import Shape, Weight, is_stored, weights


class _Reader(CheckedReader):
    """Reads whole tensors; torch's `load` copies one once more even where it was stored whole."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._memory = ReusedMemory()

    def tensor(self, name: str, stored: TensorStorageMetadata) -> Tensor:
        if len(stored.chunks) == 1:
            return self._chunk(name, stored, stored.chunks[0])
        held = sum(self._info(name, chunk).length for chunk in stored.chunks)
        if math.prod(stored.size) * stored.properties.dtype.itemsize > held:
            raise ValueError(f"{self.path} is damaged: it does not hold every number of {name}")
        whole = self._memory.new_tensor(tuple(stored.size), stored.properties.dtype)
        for chunk in stored.chunks:
            slices = tuple(
                slice(start, start + size)
                for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            whole[slices] = self._chunk(name, stored, chunk)
        return whole

    def _info(self, name: str, chunk: ChunkStorageMetadata) -> Any:
        return self.table.storage_data[MetadataIndex(name, chunk.offsets)]

    def _chunk(
        self, name: str, stored: TensorStorageMetadata, chunk: ChunkStorageMetadata
    ) -> Tensor:
        info = self._info(name, chunk)
        path = Path(self.path) / Path(info.relative_path).name  # never outside the folder
        try:
            tensor = read_saved(path, info.offset, info.length, self._memory)
        except Exception as error:  # torch raises many types for a damaged or hostile file
            raise ValueError(
                f"{path} is damaged: {name} cannot be read from it ({error}). "
                "Use an earlier checkpoint"
            ) from error
        if (tensor.shape, tensor.dtype) != (chunk.sizes, stored.properties.dtype):
            raise ValueError(f"{path} is damaged: it holds something else in the place of {name}")
        return tensor


class CheckpointWeights(Mapping[str, Tensor]):
    """Canonical weights of one checkpoint folder, each read when it is asked for.

    Tensors are whole, in the dtype of training, vocabulary not padded. With `lora` a tower may be
    its adapters (`adapters.py` puts them together with the rest). Check the folder before
    (`training.checkpoint.open_checkpoint`): its metadata is a pickle.

    Raises ValueError if a weight of the model is missing or has another shape; reading one whose
    bytes have changed since they were written, or that holds NaN or infinity, raises it too.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        lora: LoraConfig = LoraConfig(),  # noqa: B008
    ) -> None:
        self.folder = folder
        self.table = {
            name: weight for name, weight in weights(model, lora).items() if is_stored(weight, lora)
        }
        self._reader = _Reader(folder)
        stored = self._reader.table.state_dict_metadata
        self._stored = {n: m for n, m in stored.items() if isinstance(m, TensorStorageMetadata)}
        problems = [problem for name in self.table if (problem := self._problem(name))]
        if problems:
            raise ValueError(f"{folder} does not hold this model: {'; '.join(problems[:8])}")

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._reader.tensor(name, self._stored[name])
        check_finite(f"{self.folder}: {name}", tensor)
        return tensor[: self.table[name].shape[0]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds every weight exactly."""
        found = {self._stored[name].properties.dtype for name in self.table}
        return found.pop() if len(found) == 1 else torch.float32

    def _problem(self, name: str) -> str | None:
        if name not in self._stored:
            return f"{name} is missing"
        weight, found = self.table[name], tuple(self._stored[name].size)
        if (dtype := self._stored[name].properties.dtype) not in DTYPES:
            return f"{name} is {dtype}"
        return None if _fits(weight, found) else f"{name} has shape {found}, not {weight.shape}"


def _fits(weight: Weight, found: Shape) -> bool:
    if weight.cut == "vocabulary":  # may be stored with its padding rows
        return found[:1] >= weight.shape[:1] and found[1:] == weight.shape[1:]
    return found == weight.shape
