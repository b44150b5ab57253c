"""Megatron's `TransformerConfig` for the two transformers, and the layer specs with our slots.

With Transformer Engine the slots hold Megatron's wrappers of its linears and norms, one by one. Its
linear with a norm inside is not used: it saves traffic in FP8 only, would give the norms' weights
other names, and adapters (`lora.py`) hang on the input of a linear, which has to be the normed one.
"""

from typing import Any

import torch
from megatron.core.activations import quick_gelu
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear
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
from megatron_gmai.model.attention import SegmentAttention, attention_for
from megatron_gmai.model.norm import layer_norm_for, rms_norm_for
from megatron_gmai.model.swiglu import SwiGLU
from megatron_gmai.runtime.device import Device
from megatron_gmai.runtime.implementation import Implementation
from megatron_gmai.runtime.world import World


def _leave_uninitialised(tensor: torch.Tensor) -> None:
    """Weights are filled later by name (`training/weights.py`), the same in every layout."""


def _eager_quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's x · sigmoid(1.702 x), as it is written.

    Megatron's own compiles itself at its first call; on a CPU that takes seconds in every process,
    and a C++ compiler that a laptop may not have.
    """
    return x * torch.sigmoid(1.702 * x)


def _common(device: Device, implementation: Implementation) -> dict[str, Any]:
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
        gradient_accumulation_fusion=implementation.fused_weight_gradient,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=implementation.is_transformer_engine,
        # jit fusers cost seconds of compilation and need a GPU to pay back.
        bias_dropout_fusion=device.is_cuda,
    )


def language_transformer_config(config: Config, chunk: Chunk, world: World) -> TransformerConfig:
    """InternLM2's decoder as Megatron sees it, with the layout and the chunk's recomputation."""
    language, parallel, device = config.model.language, config.parallel, world.device
    recompute = Recompute.of(config, chunk)
    virtual = virtual_stages(parallel, language.num_layers)
    interleaved = virtual > 1
    return TransformerConfig(
        **_common(device, world.implementation),
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
        use_te_activation_func=not device.is_cuda,  # the slot of the activation is filled, by ours
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
    The host does not wait after a batch: the race behind that default of Megatron's was in torch
    before 1.13 (PyTorch's PR 82450; Megatron's PR 6919 removes such a wait).
    """
    return dict(
        batch_p2p_sync=False,
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


def vision_transformer_config(
    vision: VisionConfig, device: Device, implementation: Implementation
) -> TransformerConfig:
    """CLIP's encoder up to the layer whose output is used; not parallel in itself.

    No product adds its weight's gradient to the buffer: where activations are recomputed, torch
    hands the linears of Transformer Engine and Megatron-Core a weight without the marks by which
    they would tell Megatron's buckets that they have, and the overlapped reduction stops.
    """
    common = _common(device, implementation) | {"gradient_accumulation_fusion": False}
    return TransformerConfig(
        **common,
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


def language_block_spec(
    num_layers: int, implementation: Implementation
) -> TransformerBlockSubmodules:
    """Decoder layers of this stage: causal attention over packed segments, RMSNorm, SwiGLU."""
    norm, attention = rms_norm_for(implementation), attention_for(implementation)
    layer = _layer_spec(norm, attention, AttnMaskType.causal, implementation)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def vision_layer_spec(implementation: Implementation) -> ModuleSpec:
    """Encoder layer of CLIP: full attention inside each image, LayerNorm, quick GELU.

    Images are a dense batch: torch's own attention needs no packing for them.
    """
    norm = layer_norm_for(implementation)
    return _layer_spec(norm, SegmentAttention, AttnMaskType.no_mask, implementation)


def _layer_spec(
    norm: type, attention: type, mask: AttnMaskType, implementation: Implementation
) -> ModuleSpec:
    column, row = ColumnParallelLinear, RowParallelLinear
    if implementation.is_transformer_engine:
        column, row = TEColumnParallelLinear, TERowParallelLinear
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column, core_attention=attention, linear_proj=row
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=column, activation_func=SwiGLU, linear_fc2=row),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
