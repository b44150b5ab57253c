"""Tensor-parallel slices of the canonical tensors: which dimension is cut, and how.

The towers in front of the language model are replicated. Of the language model, qkv, embedding
and output are cut on dim 0, proj and fc2 on dim 1; rank r's fc1 is `[gate_r; up_r]`, because the
activation pairs gate and up rows of the same rank. Vocabularies are padded before they are cut.
"""

import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Cut = Literal["none", "vocabulary", "rows", "columns", "gate_up"]

_LAYER = r"language_model\.decoder\.layers\.\d+\."
_PATTERNS: dict[str, Cut] = {
    r"language_model\.(embedding\.word_embeddings|output_layer)\.weight": "vocabulary",
    _LAYER + r"self_attention\.linear_qkv\.weight": "rows",
    _LAYER + r"(self_attention\.linear_proj|mlp\.linear_fc2)\.weight": "columns",
    _LAYER + r"mlp\.linear_fc1\.weight": "gate_up",
    _LAYER + r"(input_layernorm|pre_mlp_layernorm)\.weight": "none",
    r"language_model\.decoder\.final_layernorm\.weight": "none",
    r"(vision_model|projector)\..+": "none",
}


def cut_of(name: str) -> Cut:
    """How tensor parallelism cuts the tensor of this canonical name; ValueError if unknown."""
    for pattern, cut in _PATTERNS.items():
        if re.fullmatch(pattern, name):
            return cut
    raise ValueError(f"{name!r} is not a canonical weight name of this model")


def shard(name: str, tensor: Tensor, tp_rank: int, tp_size: int, padded_vocab: int) -> Tensor:
    """Rank `tp_rank`'s part of a full tensor.

    Args:
        name: canonical name.
        tensor: the full tensor; embedding and output have [vocab_size, H] rows, not padded.
        padded_vocab: rows of embedding and output inside the model; the added rows are zero.

    Returns:
        A contiguous tensor; replicated tensors come back whole.

    Raises:
        ValueError: unknown name, a rank outside the group, or a size that does not divide.
    """
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"tensor-parallel rank {tp_rank} is outside a group of {tp_size}")
    cut = cut_of(name)
    if cut == "none":
        return tensor
    if cut == "vocabulary":
        tensor = _pad_rows(name, tensor, padded_vocab)
    if cut == "gate_up":
        gate, up = _pieces(name, tensor, 0, 2)
        parts = [_pieces(name, half, 0, tp_size)[tp_rank] for half in (gate, up)]
        return torch.cat(parts)
    dim = 1 if cut == "columns" else 0
    return _pieces(name, tensor, dim, tp_size)[tp_rank].contiguous()


def unshard(name: str, tensors: Sequence[Tensor], vocab_size: int) -> Tensor:
    """Inverse of `shard`: the full tensor from the parts of all ranks, in rank order.

    Embedding and output lose the padding rows past `vocab_size`. Of a replicated
    tensor the first rank's copy is taken.
    """
    cut = cut_of(name)
    if cut == "none":
        return tensors[0]
    if cut == "gate_up":
        halves = [_pieces(name, tensor, 0, 2) for tensor in tensors]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    full = torch.cat(list(tensors), dim=1 if cut == "columns" else 0)
    return full[:vocab_size].contiguous() if cut == "vocabulary" else full


def _pieces(name: str, tensor: Tensor, dim: int, count: int) -> tuple[Tensor, ...]:
    size = tensor.shape[dim]
    if size % count:
        raise ValueError(
            f"{name}: dimension {dim} of {tuple(tensor.shape)} does not divide by {count}; "
            "choose a tensor-parallel size that divides heads, query groups and FFN size"
        )
    return tensor.split(size // count, dim)


def _pad_rows(name: str, tensor: Tensor, padded_vocab: int) -> Tensor:
    missing = padded_vocab - tensor.shape[0]
    if missing < 0:
        raise ValueError(
            f"{name} has {tensor.shape[0]} rows, more than the padded vocabulary {padded_vocab}"
        )
    return torch.cat([tensor, tensor.new_zeros(missing, tensor.shape[1])]) if missing else tensor
