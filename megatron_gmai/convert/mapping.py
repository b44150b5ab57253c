"""The weights' names in Hugging Face checkpoints, and the tensor rules between them and ours.

`megatron_gmai.weights` says which weights there are; here each is paired with its tensors in a
Hugging Face checkpoint, of which there are two flavours:

- `transformers`: `model_type: llava`, Llama names for the language model;
- `original`: GMAI-VL's `enhanced_llava`, InternLM2 names (fused `wqkv`).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from megatron_gmai.config import ModelConfig
from megatron_gmai.convert.memory import ReusedMemory
from megatron_gmai.weights import Shape, Weight, weights

Flavour = Literal["transformers", "original"]

VISION = "vision_tower.vision_model"


@dataclass(frozen=True)
class Rule:
    """How one of our tensors is made from its sources (`merge`) and cut again (`split`);
    `shapes` are those of the sources."""

    merge: Callable[[Sequence[Tensor], ReusedMemory], Tensor]
    split: Callable[[Tensor], list[Tensor]]
    shapes: Callable[[Shape], tuple[Shape, ...]]


@dataclass(frozen=True)
class Row:
    """One weight and where a Hugging Face checkpoint keeps it."""

    weight: Weight
    sources: tuple[str, ...]
    rule: Rule

    @property
    def canonical(self) -> str:
        return self.weight.name

    @property
    def shape(self) -> Shape:
        return self.weight.shape

    @property
    def source_shapes(self) -> tuple[Shape, ...]:
        return self.rule.shapes(self.weight.shape)


def _joined(parts: Sequence[Tensor], memory: ReusedMemory, dim: int = 0) -> Tensor:
    """`torch.cat`, into memory that was used before."""
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    return torch.cat(list(parts), dim, out=memory.new_tensor(tuple(shape), dtype))


COPY = Rule(
    merge=lambda parts, memory: parts[0],
    split=lambda tensor: [tensor],
    shapes=lambda shape: (shape,),
)
# Megatron's fused first MLP layer: the gate's rows, then the up projection's.  [2F, H]
GATE_UP = Rule(
    merge=_joined,
    split=lambda tensor: list(tensor.chunk(2)),
    shapes=lambda shape: ((shape[0] // 2, *shape[1:]),) * 2,
)
# CLIP stores [Hv]; Megatron's class token broadcasts over batch and sequence: [1, 1, Hv].
CLASS_TOKEN = Rule(
    merge=lambda parts, memory: parts[0].view(1, 1, -1),
    split=lambda tensor: [tensor.view(-1)],
    shapes=lambda shape: (shape[2:],),
)


def qkv_rule(groups: int, queries_per_group: int) -> Rule:
    """Rows of q, k, v <-> Megatron's `linear_qkv`: for each group its queries, its key, its value.

    With as many groups as heads (CLIP) this is q, k, v of each head in turn. Works for weights
    [rows, columns] and for biases [rows].
    """

    def merge(parts: Sequence[Tensor], memory: ReusedMemory) -> Tensor:
        columns = parts[0].shape[1:]
        grouped = [part.reshape(groups, -1, *columns) for part in parts]
        return _joined(grouped, memory, dim=1).reshape(-1, *columns)

    def split(tensor: Tensor) -> list[Tensor]:
        columns = tensor.shape[1:]
        grouped = tensor.reshape(groups, queries_per_group + 2, -1, *columns)
        query = grouped[:, :queries_per_group]
        key, value = grouped[:, queries_per_group], grouped[:, queries_per_group + 1]
        return [part.reshape(-1, *columns) for part in (query, key, value)]

    def shapes(shape: Shape) -> tuple[Shape, ...]:
        head = shape[0] // (groups * (queries_per_group + 2))
        key = (groups * head, *shape[1:])
        return ((groups * queries_per_group * head, *shape[1:]), key, key)

    return Rule(merge, split, shapes)


def rows(model: ModelConfig, flavour: Flavour) -> tuple[Row, ...]:
    """The table of a model: every weight once, with the sources it comes from.

    Only the vision layers that run are in it; `leftover_shapes` names the rest of CLIP.
    Raises ValueError for an unknown flavour.
    """
    if flavour not in ("transformers", "original"):
        raise ValueError(
            f"unknown checkpoint flavour {flavour!r}; use 'transformers' or 'original'"
        )
    return tuple(_row(model, weight, flavour) for weight in weights(model).values())


def leftover_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Tensors of a complete CLIP that this model never runs: its last layer and final norm.

    Their names are the same in both flavours.
    """
    last = model.vision.num_layers - 1
    whole = replace(model, vision=replace(model.vision, num_layers=last + 2))
    prefix = f"{VISION}.encoder.layers.{last}."
    layer = {
        name: shape
        for row in rows(whole, "transformers")
        for name, shape in zip(row.sources, row.source_shapes, strict=True)
        if name.startswith(prefix)
    }
    hidden = (model.vision.hidden_size,)
    norm = f"{VISION}.post_layernorm"
    return {**layer, f"{norm}.weight": hidden, f"{norm}.bias": hidden}


# Our name, without the tower and the layer in front and `.weight` or `.bias` behind -> theirs.
_VISION_NAMES: dict[str, tuple[str, ...]] = {
    "class_token": ("embeddings.class_embedding",),
    "conv1": ("embeddings.patch_embedding",),
    "position_embeddings": ("embeddings.position_embedding",),
    "ln_pre": ("pre_layrnorm",),  # the misspelling is CLIP's own
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.out_proj",),
    "input_layernorm": ("layer_norm1",),
    "pre_mlp_layernorm": ("layer_norm2",),
    "mlp.linear_fc1": ("mlp.fc1",),
    "mlp.linear_fc2": ("mlp.fc2",),
}
_PROJECTOR_NAMES: dict[str, tuple[str, ...]] = {
    "linear_fc1": ("multi_modal_projector.linear_1",),
    "linear_fc2": ("multi_modal_projector.linear_2",),
}
_LLAMA_NAMES: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings": ("model.embed_tokens",),
    "decoder.final_layernorm": ("model.norm",),
    "output_layer": ("lm_head",),
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "input_layernorm": ("input_layernorm",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
_INTERNLM2_NAMES: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings": ("model.tok_embeddings",),
    "decoder.final_layernorm": ("model.norm",),
    "output_layer": ("output",),
    "self_attention.linear_qkv": ("attention.wqkv",),  # in Megatron's own order
    "self_attention.linear_proj": ("attention.wo",),
    "input_layernorm": ("attention_norm",),
    "pre_mlp_layernorm": ("ffn_norm",),
    "mlp.linear_fc1": ("feed_forward.w1", "feed_forward.w3"),  # gate, up
    "mlp.linear_fc2": ("feed_forward.w2",),
}
_NAME = re.compile(
    r"(?P<tower>\w+)\.(?:decoder\.layers\.(?P<layer>\d+)\.)?(?P<stem>.+?)(?P<kind>\.weight|\.bias)?"
)


def _row(model: ModelConfig, weight: Weight, flavour: Flavour) -> Row:
    found = _NAME.fullmatch(weight.name)
    assert found is not None
    stem, layer, kind = found["stem"], found["layer"], found["kind"] or ""
    if weight.tower == "projector":
        names, prefix = _PROJECTOR_NAMES, ""
    elif weight.tower == "vision_model":
        names = _VISION_NAMES
        prefix = f"{VISION}." if layer is None else f"{VISION}.encoder.layers.{layer}."
    else:
        names = _LLAMA_NAMES if flavour == "transformers" else _INTERNLM2_NAMES
        prefix = "language_model." if layer is None else f"language_model.model.layers.{layer}."
    sources = tuple(f"{prefix}{name}{kind}" for name in names[stem])
    return Row(weight, sources, _rule(model, weight, stem, len(sources)))


def _rule(model: ModelConfig, weight: Weight, stem: str, sources: int) -> Rule:
    if stem == "class_token":
        return CLASS_TOKEN
    if sources == 1:
        return COPY
    if sources == 2:
        return GATE_UP
    if weight.tower == "vision_model":
        return qkv_rule(model.vision.num_attention_heads, 1)
    language = model.language
    groups = language.num_query_groups
    return qkv_rule(groups, language.num_attention_heads // groups)
