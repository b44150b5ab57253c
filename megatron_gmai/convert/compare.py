"""Two sets of weights, tensor by tensor, wherever each of them is stored."""

import hashlib
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_gmai.config import ModelConfig

_PACKAGES = ("megatron-gmai", "torch", "safetensors", "sentencepiece", "megatron-core")
_BLOCK = 1 << 24  # values, or bytes of a file, at a time


@dataclass(frozen=True)
class Side:
    """Weights of one folder, by canonical name, each read when it is asked for."""

    path: Path
    kind: str  # what a reader calls it: "training checkpoint", "transformers", "gmai-vl"
    model: ModelConfig
    weights: Mapping[str, Tensor]
    leftovers: Mapping[str, Tensor]  # parts of CLIP that never run


@dataclass(frozen=True)
class Group:
    """All tensors whose names differ only in the number of the layer."""

    name: str
    tensors: int
    largest_difference: float
    largest_value: float
    dtypes: tuple[str, str]


def compare(a: Side, b: Side, advance: Callable[[int], None]) -> list[Group]:
    """The largest difference of every group.

    Where the dtypes differ, the wider value is rounded to the narrower dtype first: a cast that
    rounded correctly has a difference of exactly 0.

    Raises ValueError if the two are not of one architecture, or as reading a tensor does.
    """
    _check_models(a, b)
    groups: dict[str, Group] = {}
    pairs = [(name, a.weights, b.weights) for name in a.weights]
    if a.leftovers and b.leftovers:
        pairs += [(name, a.leftovers, b.leftovers) for name in a.leftovers]
    for name, ours, theirs in pairs:
        one, two = ours[name], theirs[name]
        found = _group(re.sub(r"\.\d+\.", ".*.", name), one, two)
        before = groups.get(found.name)
        groups[found.name] = found if before is None else _joined(before, found)
        advance(one.nbytes)
    return list(groups.values())


def only_in_one(a: Side, b: Side) -> str | None:
    """A sentence on what cannot be compared because one side lacks it; None if nothing."""
    if bool(a.leftovers) == bool(b.leftovers):
        return None
    lacking = b if a.leftovers else a
    return f"{lacking.path} carries no last CLIP layer and final norm: those were not compared"


def table(groups: list[Group]) -> str:
    """The groups as lines for a terminal."""
    width = max(len(group.name) for group in groups)
    lines = [f"{'tensors':<{width}}  count  largest value  largest difference"]
    for group in groups:
        rounded = "" if len(set(group.dtypes)) == 1 else f"  ({' and '.join(group.dtypes)})"
        lines.append(
            f"{group.name:<{width}}  {group.tensors:>5}  {group.largest_value:>13.4g}  "
            f"{group.largest_difference:>18.3g}{rounded}"
        )
    return "\n".join(lines)


def card(
    command: list[str], sides: tuple[Side, Side], tolerance: float, groups: list[Group], ran: Any
) -> dict[str, Any]:
    """What card.json says: the command, the files and their hashes, versions and results."""
    versions = {name: _version(name) for name in (*_PACKAGES, "transformers")}
    return {
        "command": command,
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
        "compared": [_described(side) for side in sides],
        "tolerance": tolerance,
        "largest_difference": max(group.largest_difference for group in groups),
        "groups": [asdict(group) for group in groups],
        "not_compared": only_in_one(*sides),
        "run": ran,
    }


def _check_models(a: Side, b: Side) -> None:
    one, two = (_sizes(side.model) for side in (a, b))
    differing = [f"{key}: {one[key]} and {two[key]}" for key in one if one[key] != two[key]]
    if differing:
        raise ValueError(f"{a.path} and {b.path} are of two models: {'; '.join(differing)}")


def _sizes(model: ModelConfig) -> dict[str, Any]:
    tree = asdict(model)
    towers = ("vision", "language")
    flat = {f"{tower}.{key}": value for tower in towers for key, value in tree[tower].items()}
    return flat | {"image_token_id": model.image_token_id}


def _group(name: str, one: Tensor, two: Tensor) -> Group:
    narrow = min((one.dtype, two.dtype), key=lambda dtype: dtype.itemsize)
    if one.dtype.itemsize == two.dtype.itemsize and one.dtype != two.dtype:
        narrow = torch.float32  # of bf16 and fp16 neither holds the other
    difference = 0.0
    if not (one.dtype == two.dtype and torch.equal(one, two)):
        for ours, theirs in zip(*(t.flatten().split(_BLOCK) for t in (one, two)), strict=True):
            apart = ours.to(narrow).float() - theirs.to(narrow).float()
            difference = max(difference, float(apart.abs().max()))
    smallest, most = torch.aminmax(one)
    dtypes = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in (one, two))
    return Group(
        name, 1, difference, max(abs(float(smallest)), abs(float(most))), (dtypes[0], dtypes[1])
    )


def _joined(one: Group, two: Group) -> Group:
    return Group(
        one.name,
        one.tensors + two.tensors,
        max(one.largest_difference, two.largest_difference),
        max(one.largest_value, two.largest_value),
        one.dtypes if len(set(one.dtypes)) > 1 else two.dtypes,
    )


def _described(side: Side) -> dict[str, Any]:
    files = sorted(path for path in side.path.iterdir() if path.is_file())
    hashes = {path.name: _sha256(path) for path in files if path.name != "card.json"}
    return {"folder": side.path.name, "kind": side.kind, "sha256": hashes}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
