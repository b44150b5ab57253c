"""Fill a model's weights: from a seed or from whole tensors, the same in every layout."""

import hashlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_gmai.config import ModelConfig
from megatron_gmai.convert.mapping import canonical_shapes
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


class SeededWeights(Mapping[str, Tensor]):
    """Whole random tensors by canonical name, a pure function of seed, name and shape.

    Matrices are normal with standard deviation sqrt(2 / (5 · fan_in)) (Nguyen & Salazar, 2019);
    the two projections that write to the residual stream of L layers are divided by sqrt(2 L).
    """

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self.shapes, self.seed = canonical_shapes(model), seed
        self.layers = model.language.num_layers

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if name.endswith("bias"):
            return torch.zeros(shape)
        if "norm" in name or "ln_pre" in name:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        fan_in = math.prod(shape[1:])
        std = math.sqrt(2 / (5 * fan_in))
        if "linear_proj" in name or "linear_fc2" in name and not name.startswith("projector"):
            std /= math.sqrt(2 * self.layers)
        return torch.empty(shape).normal_(0, std, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
