"""Tensor files of a Hugging Face folder: safetensors or `.bin`, in one file or sharded by an index.

Nothing is read before it is asked for. Names come out in one spelling, whichever release of
transformers wrote them.
"""

import json
import re
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_gmai.convert.memory import ReusedMemory, aligned, mapped

# transformers has moved these prefixes about between releases; the spelling kept is 4.46's.
_RESPELLINGS = (
    (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", ""),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^language_model\.(?!model\.|lm_head\.|output\.)", "language_model.model."),
)
SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DTYPES = tuple(SAFETENSORS_DTYPES.values())
# Buffers that old releases saved; they follow from the sizes.
_BUFFERS = re.compile(r".*\.(position_ids|rotary_emb\.inv_freq)")
# A folder of the whole CLIP: its text tower and what compares the two.
_OTHER_HALF = re.compile(r"text_model\.|text_projection\.|visual_projection\.|logit_scale$")


class TensorFile(Protocol):
    """One file of tensors."""

    path: Path

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def tensor(self, name: str) -> Tensor: ...


class SafetensorsFile:
    """A safetensors file. The library checks it once; its tensors are then mapped one at a time
    (see `mapped`), which the library does by reading the whole header again."""

    def __init__(self, path: Path) -> None:
        self.path, self._memory = path, ReusedMemory()

    def _open(self) -> Any:
        try:
            return safe_open(str(self.path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path} is not a whole safetensors file ({error}): download it again"
            ) from error

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        handle = self._open()
        return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118

    @cached_property
    def _places(self) -> dict[str, tuple[str, int, int]]:
        """Name to dtype, first byte and number of bytes."""
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        return {
            name: (entry["dtype"], 8 + length + begin, end - begin)
            for name, entry in header.items()
            if name != "__metadata__"
            for begin, end in [entry["data_offsets"]]
        }

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str) -> Tensor:
        spelled, start, count = self._places[name]
        if spelled not in SAFETENSORS_DTYPES or not count:  # nothing that is ever converted
            return self._open().get_tensor(name)
        values = mapped(self.path, start, count)
        return aligned(values, SAFETENSORS_DTYPES[spelled], self._memory).view(self._shapes[name])


class TorchFile:
    """A `.bin` file of `torch.save`; never unpickles anything but tensors.

    Memory-mapped for as long as one of its tensors is in use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def _load(self) -> dict[str, Tensor]:
        if not zipfile.is_zipfile(self.path):
            raise ValueError(
                f"{self.path} is not a whole file of torch.save since torch 1.6: download it "
                "again, or, if it is older, load and save it with a newer torch"
            )
        try:
            value = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many types for a broken or hostile file
            raise ValueError(
                f"{self.path} is not a whole file of tensors ({str(error).partition('. ')[0]}): "
                "download it again, or, if it holds more than tensors and you trust its source, "
                "load it there and save its tensors with safetensors.torch.save_file"
            ) from error
        if not isinstance(value, dict) or not all(isinstance(v, Tensor) for v in value.values()):
            raise ValueError(f"{self.path} does not hold a dictionary of tensors")
        for name, tensor in value.items():
            # A small file could otherwise spell a tensor that fills all memory: strides of 0.
            if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
                raise ValueError(f"{self.path} does not hold every number of {name}")
        return value

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._load().items()}

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str) -> Tensor:
        return self._load()[name]


class TensorFolder:
    """All tensors of a checkpoint folder, by their name in the kept spelling.

    A folder that holds one tower alone gets the `prefix` that the whole model gives it.

    Raises ValueError when the folder holds no weights, when the index names a file outside the
    folder or one that is missing, or when two tensors have the same name.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder = folder
        self._holders: dict[str, tuple[TensorFile, str]] = {}
        for path in weight_files(folder):
            self._add(TorchFile(path) if path.suffix == ".bin" else SafetensorsFile(path), prefix)

    def _add(self, file: TensorFile, prefix: str) -> None:
        for written in file.names():
            name = respell(prefix + written)
            if _BUFFERS.fullmatch(written) or (prefix and _OTHER_HALF.match(written)):
                continue
            if name in self._holders:
                raise ValueError(f"{self.folder} holds {name} twice (second as {written!r})")
            self._holders[name] = (file, written)

    def join(self, other: "TensorFolder") -> None:
        """Take in the tensors of another folder, whose names are different ones."""
        assert not self._holders.keys() & other._holders.keys()
        self._holders |= other._holders

    def __contains__(self, name: object) -> bool:
        return name in self._holders

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def shape(self, name: str) -> tuple[int, ...]:
        file, written = self._holders[name]
        return file.shape(written)

    def tensor(self, name: str) -> Tensor:
        file, written = self._holders[name]
        tensor = file.tensor(written)
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{file.path}: {written} is {tensor.dtype}; quantised weights cannot be read: "
                "give the bf16, fp16 or fp32 weights that they were made from"
            )
        check_finite(f"{file.path}: {written}", tensor)
        return tensor


def check_finite(where: str, tensor: Tensor) -> None:
    """Raises ValueError, naming the place, if the tensor holds NaN or infinity."""
    # Not isfinite().all(), which is thirty times slower in bf16; NaN wins every comparison here.
    smallest, largest = torch.aminmax(tensor)
    if not torch.isfinite(smallest) or not torch.isfinite(largest):
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise ValueError(
            f"{where} holds NaN or infinity in {bad} of {tensor.numel()} places; "
            "use an earlier checkpoint, or download the file again"
        )


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`. Raises ValueError, naming it, if that makes infinity of a number."""
    found = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and found.numel():
        smallest, largest = torch.aminmax(found)
        if not torch.isfinite(smallest) or not torch.isfinite(largest):
            spelled = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} holds values up to {float(tensor.abs().max()):.3g}, more than {spelled} "
                "can hold; choose another --dtype"
            )
    return found


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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
