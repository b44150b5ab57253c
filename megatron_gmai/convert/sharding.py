"""Tensor-parallel parts of whole weights, and whole weights from the parts, by the cut that
`megatron_gmai.weights` states."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_gmai.weights import Weight, padded_vocab_size


def shard(weight: Weight, tensor: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """Rank `tp_rank`'s part of a whole tensor; the vocabulary's padding rows are zero.

    Returns a contiguous tensor; replicated ones come back whole.
    Raises ValueError for a rank outside the group, or a size that does not divide.
    """
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"tensor-parallel rank {tp_rank} is outside a group of {tp_size}")
    if weight.cut == "none":
        return tensor
    if weight.cut == "vocabulary":
        tensor = _pad_rows(weight, tensor, padded_vocab_size(weight.shape[0], tp_size))
    if weight.cut == "gate_up":
        gate, up = _pieces(weight, tensor, 0, 2)
        return torch.cat([_pieces(weight, half, 0, tp_size)[tp_rank] for half in (gate, up)])
    dim = 1 if weight.cut == "columns" else 0
    return _pieces(weight, tensor, dim, tp_size)[tp_rank].contiguous()


def unshard(weight: Weight, tensors: Sequence[Tensor]) -> Tensor:
    """Inverse of `shard`: the whole tensor from the parts of all ranks, in rank order.

    Embedding and output lose their padding rows. Of a replicated tensor the first rank's copy is
    taken.
    """
    if weight.cut == "none":
        return tensors[0]
    if weight.cut == "gate_up":
        halves = [_pieces(weight, tensor, 0, 2) for tensor in tensors]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    full = torch.cat(list(tensors), dim=1 if weight.cut == "columns" else 0)
    return full[: weight.shape[0]].contiguous() if weight.cut == "vocabulary" else full


def _pieces(weight: Weight, tensor: Tensor, dim: int, count: int) -> tuple[Tensor, ...]:
    size = tensor.shape[dim]
    if size % count:
        raise ValueError(
            f"{weight.name}: dimension {dim} of {tuple(tensor.shape)} does not divide by {count}; "
            "choose a tensor-parallel size that divides heads, query groups and FFN size"
        )
    return tensor.split(size // count, dim)


def _pad_rows(weight: Weight, tensor: Tensor, padded: int) -> Tensor:
    missing = padded - tensor.shape[0]
    if missing < 0:
        raise ValueError(
            f"{weight.name} has {tensor.shape[0]} rows, more than the padded vocabulary {padded}"
        )
    return torch.cat([tensor, tensor.new_zeros(missing, tensor.shape[1])]) if missing else tensor
