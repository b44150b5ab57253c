"""The weights' names and layouts: one table and four tensor rules, used in both directions.

Canonical names are those of the single-process Megatron model; each row of the table pairs one of
them with its tensors in a Hugging Face checkpoint, of which there are two flavours:

- `transformers`: `model_type: llava`, Llama names for the language model;
- `original`: GMAI-VL's `enhanced_llava`, InternLM2 names (fused `wqkv`).

Letters in shapes: `H` language hidden, `Hv` vision hidden, `F` feed-forward, `V` vocabulary,
`P` patch, `D` head size, `G` query groups (key-value heads), `R` query heads per group.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_gmai.config import ModelConfig

Flavour = Literal["transformers", "original"]
Shape = tuple[int, ...]

VISION = "vision_tower.vision_model"


@dataclass(frozen=True)
class Rule:
    """How one canonical tensor is made from its sources (`merge`) and cut again (`split`)."""

    merge: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Row:
    """One canonical tensor and where a Hugging Face checkpoint keeps it."""

    canonical: str
    shape: Shape
    sources: tuple[str, ...]
    source_shapes: tuple[Shape, ...]
    rule: Rule


COPY = Rule(merge=lambda parts: parts[0], split=lambda tensor: [tensor])
# Megatron's fused first MLP layer: the gate's rows, then the up projection's.  [2F, H]
GATE_UP = Rule(merge=lambda parts: torch.cat(list(parts)), split=lambda t: list(t.chunk(2)))
# CLIP stores [Hv]; Megatron's class token broadcasts over batch and sequence: [1, 1, Hv].
CLASS_TOKEN = Rule(merge=lambda parts: parts[0].view(1, 1, -1), split=lambda t: [t.view(-1)])


def qkv_rule(groups: int, queries_per_group: int) -> Rule:
    """Rows of q, k, v <-> Megatron's `linear_qkv`: for each group its queries, its key, its value.

    With as many groups as heads (CLIP) this is q, k, v of each head in turn. Works for weights
    [rows, columns] and for biases [rows].
    """

    def merge(parts: Sequence[Tensor]) -> Tensor:
        columns = parts[0].shape[1:]
        grouped = [part.reshape(groups, -1, *columns) for part in parts]
        return torch.cat(grouped, dim=1).reshape(-1, *columns)

    def split(tensor: Tensor) -> list[Tensor]:
        columns = tensor.shape[1:]
        grouped = tensor.reshape(groups, queries_per_group + 2, -1, *columns)
        query = grouped[:, :queries_per_group]
        key, value = grouped[:, queries_per_group], grouped[:, queries_per_group + 1]
        return [part.reshape(-1, *columns) for part in (query, key, value)]

    return Rule(merge, split)


def rows(model: ModelConfig, flavour: Flavour) -> tuple[Row, ...]:
    """The table of a model: every canonical tensor once, with the sources it comes from.

    Only the vision layers that run are in it; `leftover_shapes` names the rest of CLIP.
    Raises ValueError for an unknown flavour.
    """
    if flavour not in ("transformers", "original"):
        raise ValueError(
            f"unknown checkpoint flavour {flavour!r}; use 'transformers' or 'original'"
        )
    language = _llama_rows if flavour == "transformers" else _internlm2_rows
    return (*_vision_rows(model), *_projector_rows(model), *language(model))


def canonical_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Shape of every canonical tensor, unsharded, vocabulary not padded."""
    return {row.canonical: row.shape for row in rows(model, "transformers")}


def leftover_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Tensors of a complete CLIP that this model never runs: its last layer and final norm.

    Their names are the same in both flavours.
    """
    prefix = f"{VISION}.encoder.layers.{model.vision.num_layers - 1}"
    layer = _vision_layer_rows(model, prefix, "")
    shapes = {
        name: shape
        for row in layer
        for name, shape in zip(row.sources, row.source_shapes, strict=True)
    }
    hidden = (model.vision.hidden_size,)
    norm = f"{VISION}.post_layernorm"
    return {**shapes, f"{norm}.weight": hidden, f"{norm}.bias": hidden}


def _one(canonical: str, source: str, shape: Shape) -> Row:
    return Row(canonical, shape, (source,), (shape,), COPY)


def _affine(canonical: str, source: str, shape: Shape) -> Iterator[Row]:
    """Weight of the given shape and a bias over its first dimension."""
    yield _one(f"{canonical}.weight", f"{source}.weight", shape)
    yield _one(f"{canonical}.bias", f"{source}.bias", shape[:1])


def _vision_rows(model: ModelConfig) -> Iterator[Row]:
    vision, hidden = model.vision, model.vision.hidden_size
    source, target = f"{VISION}.embeddings", "vision_model"
    yield Row(
        f"{target}.class_token",
        (1, 1, hidden),
        (f"{source}.class_embedding",),
        ((hidden,),),
        CLASS_TOKEN,
    )
    patch = (hidden, 3, vision.patch_size, vision.patch_size)
    yield _one(f"{target}.conv1.weight", f"{source}.patch_embedding.weight", patch)
    positions = (vision.tokens_per_image + 1, hidden)
    position = f"{target}.position_embeddings.weight"
    yield _one(position, f"{source}.position_embedding.weight", positions)
    # The misspelling is CLIP's own.
    yield from _affine(f"{target}.ln_pre", f"{VISION}.pre_layrnorm", (hidden,))
    for layer in range(vision.layers_used):
        yield from _vision_layer_rows(
            model, f"{VISION}.encoder.layers.{layer}", f"{target}.decoder.layers.{layer}"
        )


def _vision_layer_rows(model: ModelConfig, source: str, target: str) -> Iterator[Row]:
    vision, hidden = model.vision, model.vision.hidden_size
    rule = qkv_rule(vision.num_attention_heads, 1)
    for kind, columns in (("weight", (hidden,)), ("bias", ())):
        yield Row(
            f"{target}.self_attention.linear_qkv.{kind}",
            (3 * hidden, *columns),
            tuple(f"{source}.self_attn.{part}_proj.{kind}" for part in "qkv"),
            ((hidden, *columns),) * 3,
            rule,
        )
    ffn = vision.ffn_hidden_size
    for name, theirs, shape in (
        ("self_attention.linear_proj", "self_attn.out_proj", (hidden, hidden)),
        ("input_layernorm", "layer_norm1", (hidden,)),
        ("pre_mlp_layernorm", "layer_norm2", (hidden,)),
        ("mlp.linear_fc1", "mlp.fc1", (ffn, hidden)),
        ("mlp.linear_fc2", "mlp.fc2", (hidden, ffn)),
    ):
        yield from _affine(f"{target}.{name}", f"{source}.{theirs}", shape)


def _projector_rows(model: ModelConfig) -> Iterator[Row]:
    inside, outside = model.vision.hidden_size, model.language.hidden_size
    source = "multi_modal_projector"
    yield from _affine("projector.linear_fc1", f"{source}.linear_1", (outside, inside))
    yield from _affine("projector.linear_fc2", f"{source}.linear_2", (outside, outside))


@dataclass(frozen=True)
class _LanguageNames:
    """The two spellings of the language model; the names below a layer are relative to it."""

    embedding: str
    norm: str
    output: str
    input_layernorm: str
    proj: str
    pre_mlp_layernorm: str
    gate_up: tuple[str, str]
    fc2: str
    qkv: tuple[str, ...]  # (q, k, v), or one fused tensor in Megatron's own order


_LLAMA = _LanguageNames(
    embedding="embed_tokens",
    norm="norm",
    output="language_model.lm_head",
    input_layernorm="input_layernorm",
    proj="self_attn.o_proj",
    pre_mlp_layernorm="post_attention_layernorm",
    gate_up=("mlp.gate_proj", "mlp.up_proj"),
    fc2="mlp.down_proj",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)
_INTERNLM2 = _LanguageNames(
    embedding="tok_embeddings",
    norm="norm",
    output="language_model.output",
    input_layernorm="attention_norm",
    proj="attention.wo",
    pre_mlp_layernorm="ffn_norm",
    gate_up=("feed_forward.w1", "feed_forward.w3"),
    fc2="feed_forward.w2",
    qkv=("attention.wqkv",),
)


def _llama_rows(model: ModelConfig) -> Iterator[Row]:
    return _language_rows(model, _LLAMA)


def _internlm2_rows(model: ModelConfig) -> Iterator[Row]:
    return _language_rows(model, _INTERNLM2)


def _language_rows(model: ModelConfig, names: _LanguageNames) -> Iterator[Row]:
    language, target = model.language, "language_model"
    source = "language_model.model"
    vocabulary = (language.vocab_size, language.hidden_size)
    yield _one(
        f"{target}.embedding.word_embeddings.weight",
        f"{source}.{names.embedding}.weight",
        vocabulary,
    )
    for layer in range(language.num_layers):
        yield from _language_layer_rows(
            model, names, f"{source}.layers.{layer}", f"{target}.decoder.layers.{layer}"
        )
    final = f"{target}.decoder.final_layernorm.weight"
    yield _one(final, f"{source}.{names.norm}.weight", (language.hidden_size,))
    yield _one(f"{target}.output_layer.weight", f"{names.output}.weight", vocabulary)


def _language_layer_rows(
    model: ModelConfig, names: _LanguageNames, source: str, target: str
) -> Iterator[Row]:
    language, hidden = model.language, model.language.hidden_size
    ffn, heads = language.ffn_hidden_size, language.num_attention_heads
    groups = language.num_query_groups
    per_group, head = heads // groups, hidden // heads
    q, kv = (heads * head, hidden), (groups * head, hidden)
    fused = ((heads + 2 * groups) * head, hidden)
    separate = len(names.qkv) == 3
    yield Row(
        f"{target}.self_attention.linear_qkv.weight",
        fused,
        tuple(f"{source}.{name}.weight" for name in names.qkv),
        (q, kv, kv) if separate else (fused,),
        qkv_rule(groups, per_group) if separate else COPY,
    )
    yield Row(
        f"{target}.mlp.linear_fc1.weight",
        (2 * ffn, hidden),
        tuple(f"{source}.{name}.weight" for name in names.gate_up),
        ((ffn, hidden),) * 2,
        GATE_UP,
    )
    for name, theirs, shape in (
        ("input_layernorm", names.input_layernorm, (hidden,)),
        ("self_attention.linear_proj", names.proj, (hidden, heads * head)),
        ("pre_mlp_layernorm", names.pre_mlp_layernorm, (hidden,)),
        ("mlp.linear_fc2", names.fc2, (hidden, ffn)),
    ):
        yield _one(f"{target}.{name}.weight", f"{source}.{theirs}.weight", shape)
