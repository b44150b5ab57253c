"""The weights of a training checkpoint, read without Megatron and in any layout.

A checkpoint folder is torch's distributed format (`.metadata` and `*.distcp`); the model's tensors
are stored under their canonical names with the offsets of each rank's part, so torch alone can put
a whole tensor together.
"""

import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_gmai.config import ModelConfig
from megatron_gmai.convert.files import check_finite
from megatron_gmai.convert.mapping import Shape, canonical_shapes
from megatron_gmai.convert.sharding import cut_of


class _Reader(dcp.FileSystemReader):
    """Reads the table of contents once, not for every tensor again."""

    @cached_property
    def _table(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._table


class CheckpointWeights(Mapping[str, Tensor]):
    """Canonical weights of one checkpoint folder, each read when it is asked for.

    Tensors are whole, in the dtype of training, vocabulary not padded. Check the folder before
    (`training.checkpoint.open_checkpoint`): its metadata is a pickle.

    Raises ValueError if a weight of the model is missing or has another shape; reading one that
    holds NaN or infinity raises it too.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.folder = folder
        self._shapes = canonical_shapes(model)
        self._reader = _Reader(folder)
        stored = self._reader.read_metadata().state_dict_metadata
        self._stored = {n: m for n, m in stored.items() if isinstance(m, TensorStorageMetadata)}
        problems = [problem for name in self._shapes if (problem := self._problem(name))]
        if problems:
            raise ValueError(f"{folder} does not hold this model: {'; '.join(problems[:8])}")

    def __getitem__(self, name: str) -> Tensor:
        shape, stored = self._shapes[name], self._stored[name]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*load in a single process.*")
            dcp.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        check_finite(f"{self.folder}: {name}", tensor)
        return tensor[: shape[0]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds every weight exactly."""
        found = {self._stored[name].properties.dtype for name in self._shapes}
        return found.pop() if len(found) == 1 else torch.float32

    def _problem(self, name: str) -> str | None:
        if name not in self._stored:
            return f"{name} is missing"
        wanted, found = self._shapes[name], tuple(self._stored[name].size)
        return None if _fits(name, wanted, found) else f"{name} has shape {found}, not {wanted}"


def _fits(name: str, wanted: Shape, found: Shape) -> bool:
    if cut_of(name) == "vocabulary":  # may be stored with its padding rows
        return found[0] >= wanted[0] and found[1:] == wanted[1:]
    return found == wanted
