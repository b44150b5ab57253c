"""Canonical weights -> a folder that transformers, vLLM, SGLang or GMAI-VL's own code load."""

import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_gmai.config import ModelConfig
from megatron_gmai.convert.export_configs import (
    generation_config,
    original_config,
    transformers_config,
)
from megatron_gmai.convert.export_readme import readme
from megatron_gmai.convert.mapping import VISION, Flavour, Row, leftover_shapes, rows
from megatron_gmai.convert.output import Advance, new_folder, not_counted
from megatron_gmai.convert.processor import processor_files
from megatron_gmai.convert.read_ahead import read_ahead
from megatron_gmai.convert.safetensors_file import write_safetensors
from megatron_gmai.weights import Shape


def write_pretrained(
    folder: str | Path,
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer_model: Path,
    special_tokens: Mapping[str, int],
    reserved: Collection[int],
    chat_template: str,
    dtype: torch.dtype,
    leftovers: Mapping[str, Tensor] | None = None,
    pad_to_square: bool = True,
    flavour: Flavour = "transformers",
    max_shard_bytes: int = 5 * 10**9,
    advance: Advance = not_counted,
) -> None:
    """Write a whole folder: weights, configs, tokenizer, image processor, chat template, README.

    Tensors are asked for a few ahead of the one that is written, so memory holds the largest of
    them, not a file. The folder appears under its name only when it is complete.

    Args:
        weights: canonical name to full tensor, vocabulary not padded.
        tokenizer_model: the sentencepiece model file.
        special_tokens: name to id, as training used them.
        reserved: the pieces that training never finds in a text (`Tokenizer.reserved`).
        chat_template: a `--chat-template` name.
        dtype: of every tensor written.
        leftovers: the parts of CLIP that this model never runs, as `open_pretrained` gives them.
            Without them (a tower trained from random weights never had any) the modelling code
            still wants the tensors: an identity layer and norm are written, zeros with unit norms.
        pad_to_square: whether training padded images to a square.
        flavour: `transformers` loads without remote code; `original` is GMAI-VL's own.

    Raises:
        ValueError: the folder exists and is not empty, the disk is too small, a weight is missing
            or has another shape, or the tokenizer does not fit the model.
        OSError: writing failed; nothing is kept then.
    """
    leftovers = leftovers or {}
    _check_names(model, weights, leftovers)
    # The original code runs where transformers has no image processor that pads.
    pads = pad_to_square and flavour == "transformers"
    files = processor_files(model, tokenizer_model, special_tokens, reserved, chat_template, pads)
    config = transformers_config if flavour == "transformers" else original_config
    json_files = {
        "config.json": config(model, str(dtype).removeprefix("torch."), files.special_ids),
        "generation_config.json": generation_config(files.special_ids, files.stop_ids),
        **files.json,
    }
    texts = {**files.text, "README.md": readme(model, flavour, pad_to_square, bool(leftovers))}
    shapes = export_shapes(model, flavour)
    with new_folder(Path(folder), _num_bytes(shapes, dtype)) as unfinished:
        for name, content in json_files.items():
            _write_json(unfinished / name, content)
        for name, text in texts.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        shutil.copyfile(tokenizer_model, unfinished / "tokenizer.model")
        with closing(read_ahead(_readers(model, weights, leftovers, flavour))) as read:
            tensors = chain.from_iterable(read)
            _write_shards(unfinished, shapes, tensors, dtype, max_shard_bytes, advance)


def export_shapes(model: ModelConfig, flavour: Flavour = "transformers") -> dict[str, Shape]:
    """Name and shape of every tensor of an export, in the order in which they are written."""
    shapes = {
        source: shape
        for row in rows(model, flavour)
        for source, shape in zip(row.sources, row.source_shapes, strict=True)
    }
    return {**shapes, **leftover_shapes(model)}


def _check_names(
    model: ModelConfig, weights: Mapping[str, Tensor], leftovers: Mapping[str, Tensor]
) -> None:
    expected = {row.canonical for row in rows(model, "transformers")}
    problems = [f"{name} is missing" for name in sorted(expected - set(weights))]
    problems += [f"{name} is unknown" for name in sorted(set(weights) - expected)]
    if leftovers:  # all or none: half a layer would be filled up with an identity
        wanted = leftover_shapes(model)
        problems += [f"{name} is missing" for name in sorted(set(wanted) - set(leftovers))]
        problems += [f"{name} is unknown" for name in sorted(set(leftovers) - set(wanted))]
    if problems:
        raise ValueError(f"{len(problems)} weights do not fit the model: {'; '.join(problems[:8])}")


def _readers(
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    leftovers: Mapping[str, Tensor],
    flavour: Flavour,
) -> Iterator[Callable[[], list[Tensor]]]:
    """Functions that read the tensors of `export_shapes`, in its order."""

    def split(row: Row) -> list[Tensor]:
        tensor = weights[row.canonical]
        _check_shape(row.canonical, tensor, row.shape)
        return row.rule.split(tensor)

    def leftover(name: str, shape: Shape) -> list[Tensor]:
        tensor = leftovers[name] if leftovers else _identity(name, shape)
        _check_shape(name, tensor, shape)
        return [tensor]

    for row in rows(model, flavour):
        yield partial(split, row)
    for name, shape in leftover_shapes(model).items():
        yield partial(leftover, name, shape)


def _check_shape(name: str, tensor: Tensor, shape: Shape) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the model says {shape}")


def _identity(name: str, shape: Shape) -> Tensor:
    """A value that makes a residual layer do nothing: zero branches, unit norms."""
    norm = ("layer_norm1.weight", "layer_norm2.weight", f"{VISION}.post_layernorm.weight")
    return torch.ones(shape) if name.endswith(norm) else torch.zeros(shape)


def _write_shards(
    folder: Path,
    shapes: dict[str, Shape],
    tensors: Iterator[Tensor],
    dtype: torch.dtype,
    max_bytes: int,
    advance: Advance,
) -> None:
    plan = plan_shards(shapes, dtype.itemsize, max_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(plan, start=1):
        file = "model.safetensors"
        if len(plan) > 1:
            file = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        content = {name: shapes[name] for name in names}
        here = (next(tensors) for _ in names)
        write_safetensors(folder / file, content, dtype, here, advance)
        weight_map |= dict.fromkeys(names, file)
    if len(plan) > 1:
        index = {"metadata": {"total_size": _num_bytes(shapes, dtype)}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _num_bytes(shapes: Mapping[str, Shape], dtype: torch.dtype) -> int:
    return dtype.itemsize * sum(map(math.prod, shapes.values()))


def plan_shards(shapes: Mapping[str, Shape], itemsize: int, max_bytes: int) -> list[list[str]]:
    """Names of the tensors of each file, in order; a tensor larger than a file gets its own."""
    plan: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = itemsize * math.prod(shape)
        if plan[-1] and used + size > max_bytes:
            plan.append([])
            used = 0
        plan[-1].append(name)
        used += size
    return plan


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
