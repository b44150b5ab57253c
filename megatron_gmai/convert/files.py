"""Tensor files of a Hugging Face folder: safetensors or `.bin`, in one file or sharded by an index.

Nothing is read before it is asked for. Names come out in one spelling, whichever release of
transformers wrote them.
"""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# transformers has moved these prefixes about between releases; the spelling kept is 4.46's.
_RESPELLINGS = (
    (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", ""),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^language_model\.(?!model\.|lm_head\.|output\.)", "language_model.model."),
)
# Buffers that old releases saved; they follow from the sizes.
_BUFFERS = re.compile(r".*\.(position_ids|rotary_emb\.inv_freq)")


class TensorFile(Protocol):
    """One open file of tensors."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def tensor(self, name: str) -> Tensor: ...


class SafetensorsFile:
    """A safetensors file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _handle(self) -> Any:
        try:
            return safe_open(str(self.path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is not a whole safetensors file: {error}") from error

    def names(self) -> list[str]:
        return list(self._handle.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        return self._handle.get_tensor(name)


class TorchFile:
    """A `.bin` file of `torch.save`, memory-mapped; never unpickles anything but tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        try:
            value = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many types for a broken or hostile file
            raise ValueError(f"{self.path} is not a whole file of tensors: {error}") from error
        if not isinstance(value, dict) or not all(isinstance(v, Tensor) for v in value.values()):
            raise ValueError(f"{self.path} does not hold a dictionary of tensors")
        return value

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


class TensorFolder:
    """All tensors of a checkpoint folder, by their name in the kept spelling.

    Raises ValueError when the folder holds no weights, when the index names a file outside the
    folder or one that is missing, or when two tensors have the same name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, tuple[TensorFile, str]] = {}
        for path in weight_files(folder):
            self._add(TorchFile(path) if path.suffix == ".bin" else SafetensorsFile(path))

    def _add(self, file: TensorFile) -> None:
        for written in file.names():
            if _BUFFERS.fullmatch(written):
                continue
            name = respell(written)
            if name in self._places:
                raise ValueError(f"{self.folder} holds {name} twice (second as {written!r})")
            self._places[name] = (file, written)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        file, written = self._places[name]
        return file.shape(written)

    def tensor(self, name: str) -> Tensor:
        file, written = self._places[name]
        tensor = file.tensor(written)
        if not tensor.is_floating_point():
            raise ValueError(
                f"{self.folder}: {written} is {tensor.dtype}; quantised weights cannot be read"
            )
        return tensor


def respell(name: str) -> str:
    """The kept spelling of a tensor's name."""
    for pattern, replacement in _RESPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, safetensors before `.bin`, an index before a single file."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _indexed_files(index)
        if (folder / single).is_file():
            return [folder / single]
    raise ValueError(
        f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, "
        "nor an index of either"
    )


def _indexed_files(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weights: {error!r}") from error
    for name in names:
        # Compared by name, not resolved: download caches link to blobs outside the folder.
        if not isinstance(name, str) or name != Path(name).name or name in ("", "..", "."):
            raise ValueError(f"{index} names {name!r}; only files in the same folder are read")
        if Path(name).suffix not in (".safetensors", ".bin"):
            raise ValueError(f"{index} names {name!r}, neither .safetensors nor .bin")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name!r}, which is missing: download it again")
    return [index.parent / name for name in names]
