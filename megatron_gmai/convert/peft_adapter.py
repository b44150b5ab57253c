"""Adapters in PEFT's format, for the transformers flavour.

PEFT knows q, k, v, gate and up as linears of their own, while a fused linear here has one A and a
fused B. Each part gets that A and its own rows of B, which is the same function.
Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_gmai.config import LoraConfig, ModelConfig
from megatron_gmai.convert.adapters import adapter_names
from megatron_gmai.convert.mapping import Row, rows
from megatron_gmai.convert.output import Advance, new_folder, not_counted
from megatron_gmai.convert.safetensors_file import write_safetensors
from megatron_gmai.weights import Shape, Tower, in_words

# Where transformers has had the towers of LLaVA since 4.52; a checkpoint's own names for the same
# places are the older ones.
_PLACES = {
    "language_model.model.": "base_model.model.model.language_model.",
    "vision_tower.": "base_model.model.model.vision_tower.",
}

_README = """\
# Adapters of {towers} of GMAI-VL, exported by megatron_gmai

In PEFT's format, for {base} in transformers 4.52 or newer
(adapters of the vision tower: with transformers 5 in peft 0.20 or newer):

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained(BASE)
model = PeftModel.from_pretrained(model, FOLDER)
```

The tokenizer, the processor and the chat template are those of a whole export (`to-hf`).
{below}"""
_CHANGED = """
**The run also trained {changed}, which these adapters do not hold.** BASE must be an export of the
same checkpoint: `to-hf --without-adapters`.
"""


def write_peft(
    folder: Path,
    model: ModelConfig,
    lora: LoraConfig,
    adapters: Mapping[str, Tensor],
    base: str | None,
    changed: Sequence[Tower],
    dtype: torch.dtype = torch.float32,
    advance: Advance = not_counted,
) -> None:
    """Write a new folder that `PeftModel.from_pretrained` loads.

    Args:
        adapters: canonical names (`...linear_qkv.lora.a` and `.b`) to whole tensors.
        base: the folder of the model that the adapters belong to, if it can be loaded as it is.
        changed: the parts of that model whose own weights were trained too.

    Raises ValueError or OSError as `new_folder`.
    """
    names = set(adapter_names(model, lora))
    table = [row for row in rows(model, "transformers") if row.canonical in names]
    shapes = {name: shape for row in table for name, shape in _shapes(row, lora).items()}
    words = {
        "towers": in_words(lora.towers),
        "base": base or "what the adapters lie on (BASE: `to-hf --without-adapters` writes it)",
        "below": _CHANGED.format(changed=in_words(changed)) if changed else "",
    }
    needed = dtype.itemsize * sum(map(math.prod, shapes.values()))
    with new_folder(folder, needed) as partial:
        content = json.dumps(_config(table, lora, base), indent=2) + "\n"
        (partial / "adapter_config.json").write_text(content, encoding="utf-8")
        (partial / "README.md").write_text(_README.format(**words), encoding="utf-8")
        file = partial / "adapter_model.safetensors"
        write_safetensors(file, shapes, dtype, _tensors(table, adapters), advance)


def _config(table: list[Row], lora: LoraConfig, base: str | None) -> dict[str, Any]:
    alpha = lora.lora_alpha
    linears = (source.removesuffix(".weight") for row in table for source in row.sources)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": _pattern(linears),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _pattern(linears: Iterable[str]) -> str:
    """Matches these alone, of all in the model: the towers have linears of the same names, and
    CLIP a last layer that never runs."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for linear in linears:
        tower, _, inside = linear.partition(".")
        layers, names = found.setdefault(tower, ({}, {}))
        *_, layer, _, name = inside.split(".")
        layers[layer] = names[name] = None
    return "|".join(
        rf".*\.{tower}\..*layers\.({'|'.join(layers)})\.\w+\.({'|'.join(names)})"
        for tower, (layers, names) in found.items()
    )


def _shapes(row: Row, lora: LoraConfig) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for source, (out, inside) in zip(row.sources, row.source_shapes, strict=True):
        stem = source.removesuffix(".weight")
        for in_file, in_model in _PLACES.items():
            stem = stem.replace(in_file, in_model)
        found[f"{stem}.lora_A.weight"] = (lora.lora_rank, inside)
        found[f"{stem}.lora_B.weight"] = (out, lora.lora_rank)
    return found


def _tensors(table: list[Row], adapters: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The tensors of `_shapes`, in its order."""
    for row in table:
        stem = f"{row.canonical.removesuffix('.weight')}.lora"
        a, b = adapters[f"{stem}.a"], adapters[f"{stem}.b"]
        for part in row.rule.split(b):
            yield a
            yield part
