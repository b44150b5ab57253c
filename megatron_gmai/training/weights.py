"""Fill a model's weights from whole tensors, the same in every layout."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_gmai.convert.sharding import shard
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.model.language import padded_vocab_size
from megatron_gmai.model.names import canonical_name


def fill(model: GMAIVL, weights: Mapping[str, Tensor]) -> None:
    """Copy this rank's slices of whole tensors (by canonical name) into the model.

    Raises:
        ValueError: a tensor that the model needs is missing, or has another shape.
    """
    tp = model.groups.tp
    padded = padded_vocab_size(model.language_model.vocab_size, tp.size())
    with torch.no_grad():
        for local_name, parameter in model.named_parameters():
            name = canonical_name(model, local_name)
            if name not in weights:
                raise ValueError(f"the start weights hold no {name!r}")
            piece = shard(name, weights[name], tp.rank(), tp.size(), padded)
            if piece.shape != parameter.shape:
                raise ValueError(
                    f"{name}: the start weights give {tuple(piece.shape)} on this rank, "
                    f"the model wants {tuple(parameter.shape)}"
                )
            parameter.copy_(piece)
