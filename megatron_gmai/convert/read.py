"""Hugging Face folder -> canonical weights, one tensor at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_gmai.config import ModelConfig
from megatron_gmai.convert.configs import read_config
from megatron_gmai.convert.files import TensorFolder
from megatron_gmai.convert.mapping import Flavour, Row, leftover_shapes, rows

_SHOWN = 8  # problems listed in one message


@dataclass(frozen=True)
class Pretrained:
    """Weights found in a folder.

    `weights` and `leftovers` read and convert a tensor each time it is asked for, in the dtype of
    the file, so a model larger than memory can be streamed. `leftovers` are the parts of CLIP that
    never run (last layer, final norm); they are kept so that an export is complete, and are empty
    when the source lacks any of them.
    """

    model: ModelConfig
    weights: Mapping[str, Tensor]
    leftovers: Mapping[str, Tensor]


class LazyWeights(Mapping[str, Tensor]):
    """Canonical weights made from their sources on access."""

    def __init__(self, table: tuple[Row, ...], folder: TensorFolder) -> None:
        self._rows = {row.canonical: row for row in table}
        self._folder = folder

    def __getitem__(self, name: str) -> Tensor:
        row = self._rows[name]
        return row.rule.merge([self._folder.tensor(source) for source in row.sources])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class LazyTensors(Mapping[str, Tensor]):
    """Some tensors of a folder, as they are."""

    def __init__(self, names: tuple[str, ...], folder: TensorFolder) -> None:
        self._names = names
        self._folder = folder

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._folder.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_pretrained(folder: str | Path) -> Pretrained:
    """Open a GMAI-VL checkpoint in either flavour (found out from its config.json).

    Raises:
        ValueError: no such folder, a config that this model cannot express, a file that is
            missing, broken or outside the folder, or tensors that are missing, of another shape,
            or unknown; the message names them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the one that holds config.json")
    model, flavour = read_config(folder)
    tensors = TensorFolder(folder)
    table = rows(model, flavour)
    _check(folder, model, flavour, table, tensors)
    leftovers = tuple(leftover_shapes(model))
    complete = all(name in tensors for name in leftovers)
    return Pretrained(
        model, LazyWeights(table, tensors), LazyTensors(leftovers if complete else (), tensors)
    )


def _check(
    folder: Path,
    model: ModelConfig,
    flavour: Flavour,
    table: tuple[Row, ...],
    tensors: TensorFolder,
) -> None:
    needed = {
        source: shape
        for row in table
        for source, shape in zip(row.sources, row.source_shapes, strict=True)
    }
    optional = leftover_shapes(model)
    known = {**needed, **optional}
    problems = [f"{name} is missing" for name in needed if name not in tensors]
    problems += [f"{name} is unknown to this model" for name in tensors if name not in known]
    problems += [
        f"{name} has shape {tensors.shape(name)}, config.json says {shape}"
        for name, shape in known.items()
        if name in tensors and tensors.shape(name) != shape
    ]
    if problems:
        more = len(problems) - _SHOWN
        tail = f"; and {more} more" if more > 0 else ""
        raise ValueError(
            f"{folder} is not a whole {flavour} checkpoint: {'; '.join(problems[:_SHOWN])}{tail}"
        )
