"""Core attention for Megatron's slot: packed segments, whole images, or a key-value cache.

Shapes: T tokens of a pack (batch 1), S tokens of each of B images, K cached places, A query heads,
G key-value groups, D head size, all of this tensor-parallel rank. With context parallelism a rank
has T / cp tokens; while it attends it has all T of them, for 1 / cp of its heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import scaled_dot_product_attention

from megatron_gmai.model.attention_cpu import attend_on_cpu
from megatron_gmai.model.cache import KeyValueCache
from megatron_gmai.model.rotary import rotate
from megatron_gmai.runtime.implementation import Implementation


@dataclass
class Segments(PackedSeqParams):
    """Where the samples of a pack begin and end; with a cache, the answers' prompts or new tokens.

    `qkv_format` stays "sbhd": the rotary frequencies are already looked up per token, so Megatron
    need not split the sequence again in every layer (its "thd" path asks the device for each
    segment's length). `rotation` has their cosines and sines, each [T, 1, D / 2], where core
    attention rotates query and key; else Megatron has rotated them.
    """

    qkv_format: str = "sbhd"
    lengths: tuple[int, ...] = ()
    cache: KeyValueCache | None = None
    rotation: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Tensor, max_seqlen: int, device: torch.device
    ) -> "Segments":
        """From int32 [segments + 1] on the host."""
        lengths = tuple((cu_seqlens[1:] - cu_seqlens[:-1]).tolist())
        on_device = cu_seqlens.to(device, non_blocking=True)
        return cls(
            cu_seqlens_q=on_device,
            cu_seqlens_kv=on_device,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            lengths=lengths,
        )


class SegmentAttention(torch.nn.Module):
    """Attention by torch's scaled_dot_product_attention, one call a segment."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        pg_collection: ProcessGroupCollection,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.causal = attn_mask_type == AttnMaskType.causal
        self.cp = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> Tensor:
        """query [S, B, A, D], key and value [S, B, G, D] -> [S, B, A·D]."""
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, Segments)
            q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)  # no batch
            if packed_seq_params.rotation is not None:
                q, k = (rotate(x, *packed_seq_params.rotation) for x in (q, k))
            q, k, v = heads_for_tokens(q, k, v, self.cp)
            out = tokens_for_heads(self._attend(q, k, v, packed_seq_params), self.cp)
            return out.flatten(1).unsqueeze(1)  # [T, 1, A·D]
        assert attention_mask is None
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, A|G, S, D]
        out = scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, enable_gqa=q.size(1) != k.size(1)
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        cache = segments.cache
        if cache is not None and cache.holds(self.layer_number):
            return self.cached(query, key, value, cache)
        if cache is not None:
            cache.store(self.layer_number, key, value)
        return self.packed(query, key, value, segments)

    def cached(self, query: Tensor, key: Tensor, value: Tensor, cache: KeyValueCache) -> Tensor:
        """A new token of each of B answers: [B, A, D], [B, G, D], [B, G, D] -> [B, A, D]."""
        keys, values, visible = cache.append(self.layer_number, key, value)
        grouped = query.size(1) != key.size(1)
        out = scaled_dot_product_attention(
            query[:, :, None], keys, values, visible, enable_gqa=grouped
        )
        return out[:, :, 0]

    def packed(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        """[T, A, D], [T, G, D], [T, G, D] -> [T, A, D]; no attention across segments."""
        if query.device.type == "cpu":
            return attend_on_cpu(query, key, value, segments.lengths, self.causal)
        pieces = []
        split = (x.transpose(0, 1).split(segments.lengths, dim=1) for x in (query, key, value))
        for q, k, v in zip(*split, strict=True):  # [A|G, length, D]
            out = scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=self.causal, enable_gqa=q.size(0) != k.size(0)
            )
            pieces.append(out[0].transpose(0, 1))
        return torch.cat(pieces)


class FlashAttention(SegmentAttention):
    """Attention over all segments in one kernel of the flash-attn package."""

    def packed(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            query,
            key,
            value,
            segments.cu_seqlens_q,
            segments.cu_seqlens_kv,
            segments.max_seqlen_q,
            segments.max_seqlen_kv,
            causal=self.causal,
        )


class TorchVarlenAttention(SegmentAttention):
    """Attention over all segments in one kernel that torch brings along."""

    def packed(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(  # type: ignore[return-value]  # a pair only where one is asked for
            query,
            key,
            value,
            segments.cu_seqlens_q,
            segments.cu_seqlens_kv,
            segments.max_seqlen_q,
            segments.max_seqlen_kv,
            window_size=(-1, 0) if self.causal else (-1, -1),  # so many keys before and after
            enable_gqa=query.size(1) != key.size(1),
        )


class TransformerEngineAttention(SegmentAttention):
    """Attention over all segments by Transformer Engine: cuDNN's kernels, or flash-attn's.

    It is told of this rank's heads only. Its own context parallelism cuts every segment into
    2 · cp parts and so needs segments that divide; ours (`heads_for_tokens`) takes any.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        pg_collection: ProcessGroupCollection,
        **unused: Any,
    ) -> None:
        super().__init__(config, layer_number, attn_mask_type, attention_type, pg_collection)
        from transformer_engine.pytorch import DotProductAttention

        ranks = pg_collection.tp.size() * self.cp.size()
        self.kernel = DotProductAttention(
            num_attention_heads=config.num_attention_heads // ranks,
            kv_channels=config.kv_channels,
            num_gqa_groups=max(1, config.num_query_groups // ranks),
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal" if self.causal else "padding",
            layer_number=layer_number,
        )

    def packed(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        out = self.kernel(  # [T, A·D]
            query,
            key,
            value,
            cu_seqlens_q=segments.cu_seqlens_q,
            cu_seqlens_kv=segments.cu_seqlens_kv,
            max_seqlen_q=segments.max_seqlen_q,
            max_seqlen_kv=segments.max_seqlen_kv,
            pad_between_seqs=False,  # else it compares on the device and waits
        )
        return out.view(query.shape)


ATTENTIONS: dict[str, type[SegmentAttention]] = {
    "transformer_engine": TransformerEngineAttention,
    "flash_attn": FlashAttention,
    "torch_varlen": TorchVarlenAttention,
    "sdpa": SegmentAttention,
}


def attention_for(implementation: Implementation) -> type[SegmentAttention]:
    """The class for the language model's core-attention slot."""
    return ATTENTIONS[implementation.attention]


def heads_for_tokens(
    query: Tensor, key: Tensor, value: Tensor, cp: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """From all heads of T / cp tokens to 1 / cp of the heads of all T tokens (DeepSpeed-Ulysses,
    arXiv 2309.14509): [T / cp, A|G, D] -> [T, A|G / cp, D].

    Attention needs whole segments but only one head at a time, so every rank has the same work
    whatever the segments' lengths are. Fewer key-value groups than ranks are repeated.
    """
    ranks = cp.size()
    if ranks == 1:
        return query, key, value
    if key.size(1) % ranks:
        repeats = ranks // key.size(1)
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    parts = [x.unflatten(1, (ranks, -1)) for x in (query, key, value)]  # [T / cp, cp, a, D]
    sizes = [part.size(2) for part in parts]
    # One exchange for all three: what goes to a rank lies together. [cp, T / cp, a + 2g, D]
    exchanged = all_to_all(cp, torch.cat(parts, dim=2).transpose(0, 1).contiguous())
    q, k, v = exchanged.flatten(0, 1).split(sizes, dim=1)  # the ranks' tokens, in their order
    return q, k, v


def tokens_for_heads(out: Tensor, cp: ProcessGroup) -> Tensor:
    """The way back: [T, A / cp, D] -> [T / cp, A, D]."""
    if cp.size() == 1:
        return out
    exchanged = all_to_all(cp, out.unflatten(0, (cp.size(), -1)).contiguous())
    return exchanged.transpose(0, 1).flatten(1, 2)  # [cp, T / cp, a, D] -> [T / cp, A, D]
