"""Weights of the chunks on this rank: filled by name, and described for checkpoints.

Both read the table in `megatron_gmai.weights`, so a weight has one name and one cut everywhere.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_gmai.config import LoraConfig
from megatron_gmai.convert.sharding import shard
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.training.pieces import pieces_of_run
from megatron_gmai.training.shares import Held
from megatron_gmai.weights import Weight, is_stored, name_in_model


def named_weights(chunks: Sequence[GMAIVL]) -> Iterator[tuple[Weight, Parameter]]:
    """Every parameter on this rank with its row of the table."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            tied = chunk.share_embeddings_and_output_weights
            yield chunk.table[name_in_model(chunk.chunk, name, tied)], parameter


def fill(chunks: Sequence[GMAIVL], source: Mapping[str, Tensor], adapters: bool = False) -> None:
    """Copy this rank's parts of whole tensors into the chunks: the model's own weights, or its
    adapters.

    Raises:
        ValueError: a tensor that the model needs is missing, or has another shape.
    """
    with torch.no_grad():
        for weight, parameter in named_weights(chunks):
            if weight.is_adapter != adapters:
                continue
            if weight.name not in source:
                raise ValueError(f"the start weights hold no {weight.name!r}")
            tensor, tp = source[weight.name], chunks[0].groups.tp
            if tuple(tensor.shape) != weight.shape:
                raise ValueError(
                    f"{weight.name}: the start weights have {tuple(tensor.shape)}, the model wants "
                    f"{weight.shape}"
                )
            parameter.copy_(shard(weight, tensor, tp.rank(), tp.size()))


def weight_pieces(chunks: Sequence[GMAIVL], lora: LoraConfig) -> Iterator[Held]:
    """This rank's parameters as boxes of whole tensors: those that checkpoints of a run with these
    adapters hold.

    Every copy is read into, but one of them is written (`own_share`).
    """
    tp = chunks[0].groups.tp
    for weight, parameter in named_weights(chunks):
        if not is_stored(weight, lora):
            continue
        run, local = parameter.detach().view(-1), tuple(parameter.shape)
        for piece in pieces_of_run(weight.name, weight, local, tp.rank(), run, 0):
            yield Held.of(piece, weight)
