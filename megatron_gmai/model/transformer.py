"""Megatron's `TransformerConfig` for the two transformers, and the layer specs with our slots."""

from typing import Any

import torch
from megatron.core.activations import quick_gelu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn.functional import silu

from megatron_gmai.config import Config, VisionConfig
from megatron_gmai.layout import Chunk, Recompute, layers_of_chunks, virtual_stages
from megatron_gmai.model.attention import attention_for
from megatron_gmai.model.norm import LayerNorm, RMSNorm
from megatron_gmai.runtime.device import Device


def _leave_uninitialised(tensor: torch.Tensor) -> None:
    """Weights are filled later by name (`training/weights.py`), the same in every layout."""


def _eager_quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's x · sigmoid(1.702 x), as it is written.

    Megatron's own compiles itself at its first call; on a CPU that takes seconds in every process,
    and a C++ compiler that a laptop may not have.
    """
    return x * torch.sigmoid(1.702 * x)


def _common(device: Device) -> dict[str, Any]:
    return dict(
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=device.dtype,
        pipeline_dtype=device.dtype,
        bf16=device.dtype is torch.bfloat16,
        fp16=device.dtype is torch.float16,
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        embedding_init_method=_leave_uninitialised,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        # jit fusers cost seconds of compilation and need a GPU to pay back.
        bias_dropout_fusion=device.is_cuda,
    )


def language_transformer_config(config: Config, chunk: Chunk, device: Device) -> TransformerConfig:
    """InternLM2's decoder as Megatron sees it, with the layout and the chunk's recomputation."""
    language, parallel = config.model.language, config.parallel
    recompute = Recompute.of(config, chunk)
    virtual = virtual_stages(parallel, language.num_layers)
    interleaved = virtual > 1
    return TransformerConfig(
        **_common(device),
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_query_groups,
        ffn_hidden_size=language.ffn_hidden_size,
        layernorm_epsilon=language.rmsnorm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=silu,
        bias_activation_fusion=device.is_cuda,
        add_bias_linear=False,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if interleaved else None,
        pipeline_model_parallel_layout=_megatron_layout(config),
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        calculate_per_token_loss=True,
        **pipeline_transfers(device.is_cuda, interleaved),
        recompute_granularity=recompute.granularity,
        recompute_method=recompute.method,
        recompute_num_layers=recompute.num_layers,
    )


def pipeline_transfers(on_gpu: bool, interleaved: bool) -> dict[str, bool]:
    """How outputs travel between stages; on a CPU as plainly as possible.

    NCCL sends and receives as one batch, or overlapped with the computation of other chunks where
    there are some. A stage's output is freed once it is sent, but not with overlap: before 0.18
    Megatron-Core's interleaved schedule frees it while it is still being sent (its PR 4047).
    """
    return dict(
        batch_p2p_comm=on_gpu and not interleaved,
        overlap_p2p_comm=on_gpu and interleaved,
        deallocate_pipeline_outputs=on_gpu and not interleaved,
    )


def _megatron_layout(config: Config) -> list[list[str]] | None:
    """Our chunks in Megatron's words, so that both count layers alike; None for one stage."""
    parallel = config.parallel
    if parallel.pipeline_model_parallel_size == 1:
        return None
    chunks = [["decoder"] * n for n in layers_of_chunks(parallel, config.model.language.num_layers)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def vision_transformer_config(vision: VisionConfig, device: Device) -> TransformerConfig:
    """CLIP's encoder up to the layer whose output is used; not parallel in itself."""
    return TransformerConfig(
        **_common(device),
        num_layers=vision.layers_used,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        ffn_hidden_size=vision.ffn_hidden_size,
        layernorm_epsilon=vision.layernorm_eps,
        normalization="LayerNorm",
        activation_func=quick_gelu if device.is_cuda else _eager_quick_gelu,
        bias_activation_fusion=False,
        add_bias_linear=True,
    )


def language_block_spec(num_layers: int, device: Device) -> TransformerBlockSubmodules:
    """Decoder layers of this stage: causal attention over packed segments, RMSNorm, SwiGLU."""
    layer = _layer_spec(RMSNorm, AttnMaskType.causal, device)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def vision_layer_spec(device: Device) -> ModuleSpec:
    """Encoder layer of CLIP: full attention inside each image, LayerNorm, quick GELU."""
    return _layer_spec(LayerNorm, AttnMaskType.no_mask, device)


def _layer_spec(norm: type, mask: AttnMaskType, device: Device) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=attention_for(device),
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
