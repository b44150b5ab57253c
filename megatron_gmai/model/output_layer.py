"""The output layer, and the loss as its forward pass.

Shapes: T tokens of a micro-batch on this context-parallel rank, H hidden, V vocabulary rows of this
tensor-parallel rank.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from gmai_kernels import (
    linear_cross_entropy,
    use_implementation,
    vocab_parallel_cross_entropy,
)
from megatron_gmai.weights import padded_vocab_size


class OutputLayer(ColumnParallelLinear):
    """Hidden states -> logits, or with labels -> the loss of each token, without full logits.

    The loss is taken inside `forward`, because whoever reads the weight has to go through a call of
    this module: under `--overlap-param-gather` its pre-forward hook waits until the updated weight
    has arrived from the other data-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, vocab_size: int, loss_implementation: str, tp: ProcessGroup
    ) -> None:
        # The loss makes the weight's gradient; and Megatron's own linear fuses only with Apex.
        config = copy.copy(config)
        config.gradient_accumulation_fusion = False
        super().__init__(
            config.hidden_size,
            padded_vocab_size(vocab_size, tp.size()),
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=True,
            tp_group=tp,
        )
        self.vocab_size = vocab_size
        self.loss_implementation = loss_implementation

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """[S, B, H] -> logits [S, B, vocabulary], padding columns cut off; with labels int64 [T],
        [T or T / tp, 1, H] -> fp32 [T] losses, 0 where the label is ignored.

        Labels should lie in host memory where `hidden` is on a GPU (see `gmai_kernels`).
        """
        if labels is None:
            return super().forward(hidden)[0][..., : self.vocab_size]
        tp = self.tp_group
        collectives = tensor_parallel_collectives(tp, self.config.sequence_parallel)
        first_row = tp.rank() * self.weight.size(0)
        where = dict(vocab_start=first_row, vocab_size=self.vocab_size)
        if self.loss_implementation == "fused-linear":
            return linear_cross_entropy(
                hidden.squeeze(1), self.weight, labels, **where, **collectives
            )
        logits, _ = super().forward(hidden, runtime_gather_output=False)  # [T, 1, V]
        plain = self.loss_implementation == "torch"
        with use_implementation("torch") if plain else nullcontext():
            return vocab_parallel_cross_entropy(
                logits.squeeze(1), labels, **where, all_gather=collectives.get("all_gather")
            )


def tensor_parallel_collectives(
    group: ProcessGroup, sequence_parallel: bool
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What the loss asks of the tensor-parallel ranks; nothing where there is one rank."""
    size = group.size()
    if size == 1:
        return {}

    def all_gather(statistics: Tensor) -> Tensor:  # [...] -> [tp, ...]
        rows, *rest = statistics.shape
        gathered = statistics.new_empty(size * rows, *rest)
        dist.all_gather_into_tensor(gathered, statistics.contiguous(), group=group)
        return gathered.view(size, rows, *rest)

    def gather_sequence(hidden: Tensor) -> Tensor:  # [T / tp, H] -> [T, H]
        return all_gather(hidden).flatten(0, 1)

    def scatter_sum(gradient: Tensor) -> Tensor:  # [T, H] -> [T / tp, H]
        share = gradient.new_empty(gradient.size(0) // size, gradient.size(1))
        dist.reduce_scatter_tensor(share, gradient.contiguous(), group=group)
        return share

    def sum_over_ranks(gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=group)
        return gradient

    if sequence_parallel:
        return dict(
            all_gather=all_gather, gather_hidden=gather_sequence, reduce_hidden_grad=scatter_sum
        )
    return dict(all_gather=all_gather, reduce_hidden_grad=sum_over_ranks)
