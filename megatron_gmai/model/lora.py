"""Low-rank adapters of the two towers' linears (Hu et al., 2021, arXiv 2106.09685).

y = W x + alpha / r · B A x, with A [r, in] and B [out, r]. Fused linears (q, k and v; gate and up)
have one A and a fused B, which is the same as separate adapters that share their A; so an export
to PEFT, which knows the parts only, is exact.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from torch.nn.functional import dropout, linear

from megatron_gmai.config import LoraConfig
from megatron_gmai.runtime.groups import OF_RANK, OF_TOKENS
from megatron_gmai.weights import LORA_TARGETS, Tower

ROW_PARALLEL = ("proj", "fc2")  # of LORA_TARGETS


class Adapter(torch.nn.Module):
    """The low-rank part of one tensor-parallel linear, added to its output by a hook.

    Of a column-parallel linear (qkv, fc1) B is cut by rows like the weight, and A is whole; of a
    row-parallel one (proj, fc2) A is cut by columns, and B is whole. In the vision tower, which is
    built on a group of this rank alone, nothing is cut.
    """

    def __init__(
        self,
        base: torch.nn.Module,
        is_row_parallel: bool,
        lora: LoraConfig,
        config: TransformerConfig,
        tp: ProcessGroup,
    ) -> None:
        super().__init__()
        self.scale, self.dropout = lora.lora_alpha / lora.lora_rank, lora.lora_dropout
        self.is_row_parallel = is_row_parallel
        self.sequence_parallel, self.tp = config.sequence_parallel, tp
        weight = base.get_parameter("weight")
        out, inside = weight.shape
        make = weight.new_empty
        self.a = Parameter(make(lora.lora_rank, inside))
        self.b = Parameter(make(out, lora.lora_rank))
        whole, cut = (self.b, self.a) if self.is_row_parallel else (self.a, self.b)
        # For the gradient norm: a whole one counts once. With sequence parallelism each rank sees
        # only its tokens there, and Megatron sums the gradients of parameters marked so.
        whole.tensor_model_parallel = False  # type: ignore[attr-defined]
        whole.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        cut.tensor_model_parallel = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """The linear's own input -> what is added to its output, both as this rank holds them."""
        low = linear(self._dropped(x), self.a)  # [T, 1, r]
        if self.is_row_parallel:
            # A partial sum, over this rank's columns: of r numbers a token instead of H.
            reduce = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            low = reduce(low, group=self.tp)
        elif self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp)  # [T / tp] -> [T]
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp)  # sums the gradient
        return self.scale * linear(low, self.b)

    def _dropped(self, x: Tensor) -> Tensor:
        """Dropout by Megatron's tracker, which recomputation puts back: the same mask again."""
        if self.dropout == 0 or not self.training:
            return x
        # The tensor-parallel ranks hold the same input only where it is not divided. There, another
        # mask on each of them would give each another gradient of A. The tower of each rank, whose
        # group has no other, encodes images of its own: all ranks draw other masks.
        is_divided = self.is_row_parallel or self.sequence_parallel
        is_shared = self.tp.size() > 1 and not is_divided
        with get_cuda_rng_tracker().fork(OF_TOKENS if is_shared else OF_RANK):
            return dropout(x, self.dropout)


def add_adapters(
    tower: Tower,
    layers: torch.nn.ModuleList,
    lora: LoraConfig,
    config: TransformerConfig,
    tp: ProcessGroup,
) -> None:
    """Hang an adapter on every targeted linear of a tower's layers, as its child `lora`.

    config, tp: what the layers were built with.
    """
    for layer in layers:
        for target in lora.targets_in(tower):
            base = layer.get_submodule(LORA_TARGETS[target])
            base.lora = Adapter(base, target in ROW_PARALLEL, lora, config, tp)
            base.register_forward_hook(_add)


def drawing_the_same_again() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of torch's checkpoint: its recomputation draws the masks of its forward pass.

    torch puts back the states of its own generators; Megatron's recomputation of decoder layers
    those of the tracker too, from which the masks are drawn.
    """
    before = get_cuda_rng_tracker().get_states()

    @contextmanager
    def as_before() -> Iterator[None]:
        tracker = get_cuda_rng_tracker()
        since = tracker.get_states()
        tracker.set_states({**before})
        try:
            yield
        finally:
            tracker.set_states(since)

    return nullcontext(), as_before()


def _add(base: torch.nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    out, bias = output
    return out + base.get_submodule("lora")(arguments[0]), bias
