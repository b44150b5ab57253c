"""Weights of the chunks on this rank: filled by name, and described for checkpoints.

Both read the table in `megatron_gmai.weights`, so a weight has one name and one cut everywhere.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron_gmai.convert.sharding import shard
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.runtime.groups import Groups
from megatron_gmai.training.pieces import Piece, pieces_of_run
from megatron_gmai.weights import Weight, name_in_model


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


def weight_pieces(chunks: Sequence[GMAIVL], adapters_only: bool) -> Iterator[tuple[bool, Piece]]:
    """This rank's parameters as boxes of whole tensors, and whether this rank writes them.

    With `adapters_only` the language model is its adapters: its own weights never change.
    Every copy is read into, but one of them is written: the copies take turns, so that all
    data-parallel ranks write at once.
    """
    groups = chunks[0].groups
    for number, (weight, parameter) in enumerate(named_weights(chunks)):
        if adapters_only and weight.tower == "language_model" and not weight.is_adapter:
            continue
        writes = takes_turn(number, weight, groups, groups.dp_cp)
        run = parameter.detach().view(-1)
        local = tuple(parameter.shape)
        for piece in pieces_of_run(weight.name, weight, local, groups.tp.rank(), run, 0):
            yield writes, piece


def takes_turn(number: int, weight: Weight, groups: Groups, copies: ProcessGroup) -> bool:
    """Whether this rank's copy of the `number`-th weight is the one to write.

    `copies` hold the same data; weights that are not cut have copies on the TP ranks as well, and
    the towers and a tied embedding may have some on other pipeline stages.
    """
    turn, across = divmod(number, copies.size())
    is_mine = copies.rank() == across
    if weight.place in ("vision", "ends"):
        is_mine &= groups.pp.rank() == 0
    if weight.cut == "none":
        is_mine &= groups.tp.rank() == turn % groups.tp.size()
    return is_mine
