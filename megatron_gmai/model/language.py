"""The language model of one pipeline stage, from Megatron-Core's embedding, block and linears.

Shapes: T tokens of a micro-batch (its packs joined), H hidden, V vocabulary rows of this rank.
With sequence parallelism, hidden states between layers are [T / tp, 1, H].
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch.distributed as dist
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from torch import Tensor
from torch.distributed import ProcessGroup

from gmai_kernels import (
    linear_cross_entropy,
    use_implementation,
    vocab_parallel_cross_entropy,
)
from megatron_gmai.config import LanguageConfig
from megatron_gmai.model.attention import Segments
from megatron_gmai.model.transformer import language_block_spec
from megatron_gmai.runtime.device import Device
from megatron_gmai.runtime.groups import Groups


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


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding: a multiple of 128 on every tensor-parallel rank."""
    multiple = 128 * tp_size
    return -(-vocab_size // multiple) * multiple


class LanguageModel(MegatronModule):
    """InternLM2's layers of one stage; embedding on the first, norm and head on the last."""

    def __init__(
        self,
        config: TransformerConfig,
        language: LanguageConfig,
        loss_implementation: str,
        device: Device,
        groups: Groups,
    ) -> None:
        super().__init__(config)
        self.loss_implementation = loss_implementation
        self.vocab_size = language.vocab_size
        self.groups = groups
        padded = padded_vocab_size(language.vocab_size, groups.tp.size())
        if groups.is_first_stage:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size=padded,
                max_sequence_length=language.max_position_embeddings,
                position_embedding_type="rope",
                # Image features replace placeholders first; the merged sequence is scattered then.
                scatter_to_sequence_parallel=False,
                tp_group=groups.tp,
            )
        self.rotary = RotaryEmbedding(
            config.kv_channels, 1.0, rotary_base=language.rope_theta, cp_group=groups.solo
        )
        self.max_position_embeddings = language.max_position_embeddings
        num_layers = get_num_layers_to_build(config, pp_rank=groups.pp.rank())
        self.decoder = TransformerBlock(
            config,
            language_block_spec(num_layers, device),
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            pg_collection=groups.mcore,
        )
        if groups.is_last_stage:
            self.output_layer = ColumnParallelLinear(
                language.hidden_size,
                padded,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=True,
                tp_group=groups.tp,
            )

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, S] -> [S, B, H], the whole sequence on every tensor-parallel rank."""
        return self.embedding(tokens, position_ids=None)

    def rotary_for(self, position_ids: Tensor) -> Tensor:
        """Rotary angles of each token: [T] -> [T, 1, 1, D]."""
        return self.rotary(self.max_position_embeddings)[position_ids]

    def forward(
        self, embeddings: Tensor | None, position_ids: Tensor, segments: Segments
    ) -> Tensor:
        """Run this stage's layers on packed tokens; the first stage is given embeddings."""
        return self.decoder(
            hidden_states=embeddings,
            attention_mask=None,
            rotary_pos_emb=self.rotary_for(position_ids),
            packed_seq_params=segments,
        )

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each token: [T or T / tp, 1, H], [T] -> fp32 [T], 0 where ignored.

        Labels may lie in host memory, and should where `hidden` is on a GPU (see `gmai_kernels`).
        """
        weight = self.output_layer.weight
        collectives = tensor_parallel_collectives(self.groups.tp, self.config.sequence_parallel)
        where = dict(vocab_start=self.groups.tp.rank() * weight.size(0), vocab_size=self.vocab_size)
        if self.loss_implementation == "fused-linear":
            return linear_cross_entropy(hidden[:, 0], weight, labels, **where, **collectives)
        logits, _ = self.output_layer(hidden, runtime_gather_output=False)  # [T, 1, V]
        plain = self.loss_implementation == "torch"
        with use_implementation("torch") if plain else nullcontext():
            return vocab_parallel_cross_entropy(
                logits[:, 0], labels, **where, all_gather=collectives.get("all_gather")
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, B, H] -> [S, B, vocabulary]; padding columns are cut off."""
        return self.output_layer(hidden)[0][..., : self.vocab_size]
