"""Weights of the chunks on this rank: filled by name, and described for checkpoints.

Both read the table in `megatron_gmai.weights`, so a weight has one name and one cut everywhere.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from torch import Tensor
from torch.nn import Parameter

from megatron_gmai.config import ModelConfig
from megatron_gmai.convert.sharding import shard
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.runtime.groups import Groups
from megatron_gmai.weights import Weight, local_shape, name_in_model, weights


def named_weights(chunks: Sequence[GMAIVL]) -> Iterator[tuple[Weight, Parameter]]:
    """Every parameter on this rank with its row of the table."""
    table = weights(chunks[0].model_config)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield table[name_in_model(chunk.chunk, name)], parameter


def fill(chunks: Sequence[GMAIVL], source: Mapping[str, Tensor]) -> None:
    """Copy this rank's parts of whole tensors into the chunks.

    Raises:
        ValueError: a tensor that the model needs is missing, or has another shape.
    """
    with torch.no_grad():
        for weight, parameter in named_weights(chunks):
            if weight.name not in source:
                raise ValueError(f"the start weights hold no {weight.name!r}")
            tensor, tp = source[weight.name], chunks[0].groups.tp
            if tuple(tensor.shape) != weight.shape:
                raise ValueError(
                    f"{weight.name}: the start weights have {tuple(tensor.shape)}, the model wants "
                    f"{weight.shape}"
                )
            parameter.copy_(shard(weight, tensor, tp.rank(), tp.size()))


def sharded_weights(
    chunks: Sequence[GMAIVL],
) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """This rank's parameters as parts of the whole tensors that a checkpoint stores, by name."""
    state, groups = {}, chunks[0].groups
    for weight, parameter in named_weights(chunks):
        assert parameter.shape == local_shape(weight, groups.tp.size())
        state[weight.name] = _sharded(weight, parameter, groups)
    return state


def _sharded(
    weight: Weight, parameter: Parameter, groups: Groups
) -> ShardedTensor | ShardedTensorFactory:
    """One part: where it lies along the cut dimension, and which of its copies this is.

    The copy numbered 0 is written. Replicated weights have a copy on every tensor-parallel rank.
    """
    tp = groups.tp
    is_cut = weight.cut != "none"
    replica = (0, 0 if is_cut else tp.rank(), groups.dp_cp.rank())
    dim = 1 if weight.cut == "columns" else 0
    offsets = [(dim, tp.rank(), tp.size())] if is_cut else []
    part = ShardedTensor.from_rank_offsets(
        weight.name, parameter, *offsets, replica_id=replica,
        # The padding of the vocabulary depends on the layout; what is padded is never read.
        allow_shape_mismatch=weight.cut == "vocabulary",
    )  # fmt: skip
    if weight.cut == "gate_up":  # two parts of one tensor: this rank's gate and its up rows
        return apply_swiglu_sharded_factory(part, ())
    return part


class SeededWeights(Mapping[str, Tensor]):
    """Whole random tensors by name, a pure function of seed, name and shape.

    Matrices are normal with standard deviation sqrt(2 / (5 · fan_in)) (Nguyen & Salazar, 2019), in
    the vision tower 1 / sqrt(fan_in) (LeCun et al., 1998). Projections that write to the residual
    stream of L layers are divided by sqrt(2 L).
    """

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self.table, self.seed, self.model = weights(model), seed, model

    def __getitem__(self, name: str) -> Tensor:
        shape = self.table[name].shape
        if name.endswith("bias"):
            return torch.zeros(shape)
        if "norm" in name or "ln_pre" in name:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.empty(shape).normal_(0, self._std(name, shape), generator=generator)

    def _std(self, name: str, shape: tuple[int, ...]) -> float:
        if name == "vision_model.position_embeddings.weight":
            return 0.3  # of the patch embeddings, which have 1
        vision = name.startswith("vision_model.")
        gain = 1.0 if vision else math.sqrt(2 / 5)
        layers = self.model.vision.layers_used if vision else self.model.language.num_layers
        if ".decoder." in name and ("linear_proj" in name or "linear_fc2" in name):
            gain /= math.sqrt(2 * layers)
        return gain / math.sqrt(math.prod(shape[1:]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)
