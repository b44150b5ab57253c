"""The language model of one chunk, from Megatron-Core's embedding, block and linears.

Shapes: T tokens of a micro-batch (its packs joined) on this context-parallel rank, H hidden.
With sequence parallelism, hidden states between layers are [T / tp, 1, H].
"""

import dataclasses

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron_gmai.config import LanguageConfig
from megatron_gmai.layout import Chunk
from megatron_gmai.model.attention import Segments
from megatron_gmai.model.output_layer import OutputLayer
from megatron_gmai.model.transformer import language_block_spec
from megatron_gmai.runtime.world import World
from megatron_gmai.weights import padded_vocab_size

VOCABULARY_TABLES = ("word_embeddings.weight", "output_layer.weight")


class LanguageModel(MegatronModule):
    """InternLM2's layers of one chunk; embedding on the first, norm and output layer on the last.

    It is composed from Megatron's parts instead of its GPTModel: the loss takes hidden states and
    the output weight, and image features enter between embedding and layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        language: LanguageConfig,
        loss_implementation: str,
        chunk: Chunk,
        world: World,
    ) -> None:
        super().__init__(config)
        groups = world.groups
        if chunk.is_first:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size=padded_vocab_size(language.vocab_size, groups.tp.size()),
                max_sequence_length=language.max_position_embeddings,
                position_embedding_type="rope",
                # Image features replace placeholders first; the merged sequence is scattered then.
                scatter_to_sequence_parallel=False,
                tp_group=groups.tp,
            )
        # Alone in its group: angles are looked up by position, never cut by context rank.
        self.rotary = RotaryEmbedding(
            config.kv_channels, 1.0, rotary_base=language.rope_theta, cp_group=groups.solo
        )
        self.max_position_embeddings = language.max_position_embeddings
        self.decoder = TransformerBlock(
            config,
            language_block_spec(len(chunk.layers), world.implementation),
            pre_process=chunk.is_first,
            post_process=chunk.is_last,
            pg_collection=groups.mcore,
            vp_stage=chunk.virtual,
        )
        if chunk.is_last:
            self.output_layer = OutputLayer(
                config, language.vocab_size, loss_implementation, groups.tp
            )
        self._clear_padding(language.vocab_size, groups.tp)
        if language.tie_word_embeddings:
            self._tie(chunk)

    def _clear_padding(self, vocab_size: int, tp: ProcessGroup) -> None:
        """Zero the vocabulary's padding rows: no file holds them, so nothing else ever writes them.

        The loss masks their columns, but 0 times whatever memory held would still reach the hidden
        states' gradient.
        """
        for table in self._vocabulary_tables():
            real = vocab_size - tp.rank() * table.size(0)
            table.data[max(real, 0) :].zero_()

    def _tie(self, chunk: Chunk) -> None:
        """One weight for embedding and output layer; on two pipeline stages, two copies of it that
        start alike and get the sum of both gradients."""
        if chunk.is_first and chunk.is_last:
            self.output_layer.weight = self.embedding.word_embeddings.weight
            return
        for table in self._vocabulary_tables():
            # Alone in its bucket, so that a sharded optimizer cuts both copies at the same rows.
            table.shared_embedding = True  # type: ignore[attr-defined]
            table.shared = not chunk.is_first  # type: ignore[attr-defined]  # counted once in norms

    def _vocabulary_tables(self) -> list[Parameter]:
        return [p for name, p in self.named_parameters() if name.endswith(VOCABULARY_TABLES)]

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, S] -> [S, B, H], the whole sequence on every tensor-parallel rank."""
        return self.embedding(tokens, position_ids=None)

    def rotary_for(self, position_ids: Tensor) -> Tensor:
        """Rotary angles of each token: [T] -> [T, 1, 1, D]; both halves of D are the same."""
        return self.rotary(self.max_position_embeddings)[position_ids]

    def forward(
        self, embeddings: Tensor | None, position_ids: Tensor, segments: Segments
    ) -> Tensor:
        """Run this chunk's layers on packed tokens; the first chunk is given embeddings.

        Without a fused kernel, core attention rotates query and key: Megatron takes the cosines and
        sines anew in every layer, and its formula takes twice as many passes.
        """
        angles = self.rotary_for(position_ids)
        if not self.config.apply_rope_fusion:
            halves = angles[:, 0, :, : angles.size(-1) // 2]  # [T, 1, D / 2]
            dtype = self.config.params_dtype
            rotation = halves.cos().to(dtype), halves.sin().to(dtype)
            segments = dataclasses.replace(segments, rotation=rotation)
        return self.decoder(
            hidden_states=embeddings,
            attention_mask=None,
            rotary_pos_emb=angles if self.config.apply_rope_fusion else None,
            packed_seq_params=segments,
        )
