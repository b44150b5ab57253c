"""Canonical weights -> a folder that transformers, vLLM and SGLang load without remote code."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_gmai.config import ModelConfig
from megatron_gmai.convert.configs import hf_config
from megatron_gmai.convert.mapping import VISION, leftover_shapes, rows
from megatron_gmai.convert.processor import processor_files
from megatron_gmai.weights import Shape


def write_pretrained(
    folder: str | Path,
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer_model: Path,
    special_tokens: Mapping[str, int],
    chat_template: str,
    dtype: torch.dtype,
    leftovers: Mapping[str, Tensor] | None = None,
    pad_to_square: bool = True,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write the transformers flavour: weights, configs, tokenizer, image processor, chat template.

    Tensors are asked for one at a time and at most one shard of `max_shard_bytes` is in memory.
    The folder appears under its name only when it is complete.

    Args:
        weights: canonical name to full tensor, vocabulary not padded.
        tokenizer_model: the sentencepiece model file.
        special_tokens: name to id, as training used them.
        chat_template: a `--chat-template` name.
        dtype: of every tensor written.
        leftovers: the parts of CLIP that this model never runs, as `open_pretrained` gives them.
            Without them (a tower trained from random weights never had any) transformers still
            wants the tensors: an identity layer and norm are written, zeros with unit norms.
        pad_to_square: whether training padded images to a square.

    Raises:
        ValueError: the folder exists and is not empty, a weight is missing or has another shape,
            or the tokenizer does not fit the model.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; remove it or choose another folder")
    _check_names(model, weights)
    files = processor_files(model, tokenizer_model, special_tokens, chat_template, pad_to_square)
    dtype_name = str(dtype).removeprefix("torch.")
    json_files = {
        "config.json": hf_config(model, dtype_name, files.special_ids),
        "generation_config.json": _generation_config(files.special_ids, files.stop_ids),
        **files.json,
    }
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, content in json_files.items():
            _write_json(partial / name, content)
        for name, text in files.text.items():
            (partial / name).write_text(text, encoding="utf-8")
        shutil.copyfile(tokenizer_model, partial / "tokenizer.model")
        tensors = _export_tensors(model, weights, leftovers or {}, dtype)
        _write_shards(partial, export_shapes(model), tensors, dtype.itemsize, max_shard_bytes)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def export_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of an export, in the order in which they are written."""
    shapes = {
        source: shape
        for row in rows(model, "transformers")
        for source, shape in zip(row.sources, row.source_shapes, strict=True)
    }
    return {**shapes, **leftover_shapes(model)}


def _check_names(model: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    expected = {row.canonical for row in rows(model, "transformers")}
    problems = [f"{name} is missing" for name in sorted(expected - set(weights))]
    problems += [f"{name} is unknown" for name in sorted(set(weights) - expected)]
    if problems:
        raise ValueError(f"{len(problems)} weights do not fit the model: {'; '.join(problems[:8])}")


def _export_tensors(
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    leftovers: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Exported name and tensor, in the order of `export_shapes`."""
    for row in rows(model, "transformers"):
        tensor = weights[row.canonical]
        if tuple(tensor.shape) != row.shape:
            raise ValueError(
                f"{row.canonical} has shape {tuple(tensor.shape)}, the model says {row.shape}"
            )
        parts = row.rule.split(tensor.detach().cpu())
        for name, part in zip(row.sources, parts, strict=True):
            # A copy: parts of one tensor share memory, which safetensors refuses.
            yield name, part.to(dtype).clone(memory_format=torch.contiguous_format)
    for name, shape in leftover_shapes(model).items():
        tensor = leftovers[name] if name in leftovers else _identity(name, shape)
        yield name, tensor.detach().cpu().to(dtype).contiguous()


def _identity(name: str, shape: Shape) -> Tensor:
    """A value that makes a residual layer do nothing: zero branches, unit norms."""
    norm = ("layer_norm1.weight", "layer_norm2.weight", f"{VISION}.post_layernorm.weight")
    return torch.ones(shape) if name.endswith(norm) else torch.zeros(shape)


def _write_shards(
    folder: Path,
    shapes: dict[str, Shape],
    tensors: Iterator[tuple[str, Tensor]],
    itemsize: int,
    max_bytes: int,
) -> None:
    plan = plan_shards(shapes, itemsize, max_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(plan, start=1):
        file = "model.safetensors"
        if len(plan) > 1:
            file = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        content = {}
        for name in names:
            exported, content[name] = next(tensors)
            assert exported == name, (exported, name)
            weight_map[name] = file
        save_file(content, folder / file, metadata={"format": "pt"})
    if len(plan) > 1:
        total = sum(itemsize * _count(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def plan_shards(shapes: Mapping[str, Shape], itemsize: int, max_bytes: int) -> list[list[str]]:
    """Names of the tensors of each file, in order; a tensor larger than a file gets its own."""
    plan: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = itemsize * _count(shape)
        if plan[-1] and used + size > max_bytes:
            plan.append([])
            used = 0
        plan[-1].append(name)
        used += size
    return plan


def _count(shape: Shape) -> int:
    return int(torch.Size(shape).numel())


def _generation_config(
    special_ids: Mapping[str, int | None], stop_ids: list[int]
) -> dict[str, Any]:
    return {
        "bos_token_id": special_ids["bos"],
        "eos_token_id": stop_ids,
        "pad_token_id": special_ids["pad"],
        "do_sample": False,
    }


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
