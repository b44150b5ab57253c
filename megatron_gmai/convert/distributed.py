"""The weights of a training checkpoint, read without Megatron and in any layout.

A checkpoint folder is torch's distributed format (`.metadata` and `*.distcp`); the model's tensors
are stored under their canonical names with the offsets of each rank's part, so torch alone can put
a whole tensor together.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_gmai.config import ModelConfig
from megatron_gmai.weights import Shape, Weight, weights


class CheckpointWeights(Mapping[str, Tensor]):
    """Canonical weights of one checkpoint folder, each read when it is asked for.

    Tensors are whole, in the dtype of training, vocabulary not padded. Check the folder before
    (`training.checkpoint.open_checkpoint`): its metadata is a pickle.

    Raises ValueError if a weight of the model is missing or has another shape.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.folder = folder
        self._weights = weights(model)
        stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        self._stored = {n: m for n, m in stored.items() if isinstance(m, TensorStorageMetadata)}
        problems = [problem for name in self._weights if (problem := self._problem(name))]
        if problems:
            raise ValueError(f"{folder} does not hold this model: {'; '.join(problems[:8])}")

    def __getitem__(self, name: str) -> Tensor:
        shape, stored = self._weights[name].shape, self._stored[name]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*load in a single process.*")
            dcp.load({name: tensor}, storage_reader=dcp.FileSystemReader(self.folder), no_dist=True)
        return tensor[: shape[0]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def _problem(self, name: str) -> str | None:
        if name not in self._stored:
            return f"{name} is missing"
        weight, found = self._weights[name], tuple(self._stored[name].size)
        return None if _fits(weight, found) else f"{name} has shape {found}, not {weight.shape}"


def _fits(weight: Weight, found: Shape) -> bool:
    if weight.cut == "vocabulary":  # may be stored with its padding rows
        return found[0] >= weight.shape[0] and found[1:] == weight.shape[1:]
    return found == weight.shape
