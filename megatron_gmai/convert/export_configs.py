"""`ModelConfig` -> config.json and generation_config.json of either flavour."""

from collections.abc import Mapping
from typing import Any

from megatron_gmai.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_gmai.convert.configs import LLAVA_SETTINGS
from megatron_gmai.convert.rope import hf_rope

# The modules of the original flavour's own code, and their classes. An export does not contain
# them; its README.md says where they are.
REMOTE_CODE = {
    "configuration_llava.py": "EnhancedLlavaConfig",
    "modeling_llava.py": "LlavaForConditionalGeneration",
    "configuration_internlm2.py": "InternLM2Config",
    "modeling_internlm2.py": "InternLM2ForCausalLM",
}


def transformers_config(
    model: ModelConfig, dtype: str, special_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """config.json of the transformers flavour, spelled so that 4.46 and 5.x both read it.

    `special_ids` holds `bos`, `eos` and `pad` of the tokenizer.
    """
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": dtype,
        "image_token_index": model.image_token_id,
        "image_seq_length": model.vision.tokens_per_image,
        "tie_word_embeddings": model.language.tie_word_embeddings,
        **LLAVA_SETTINGS,
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **_text_config(model.language, dtype, special_ids),
            "head_dim": model.language.hidden_size // model.language.num_attention_heads,
            "attention_bias": False,
            "mlp_bias": False,
        },
        "vision_config": _vision_config(model.vision, dtype),
    }


def original_config(
    model: ModelConfig, dtype: str, special_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """config.json of GMAI-VL's own flavour, whose classes are remote code."""
    settings = {k: v for k, v in LLAVA_SETTINGS.items() if k != "multimodal_projector_bias"}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "enhanced_llava",
        "auto_map": {
            "AutoConfig": "configuration_llava.EnhancedLlavaConfig",
            "AutoModel": "modeling_llava.LlavaForConditionalGeneration",
        },
        "torch_dtype": dtype,
        "ignore_index": -100,
        "image_token_index": model.image_token_id,
        "pad_token_id": special_ids["pad"],  # its merging of text and images looks for padding
        "tie_word_embeddings": model.language.tie_word_embeddings,
        **settings,
        "text_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_internlm2.InternLM2Config",
                "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
                "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
            },
            "model_type": "internlm2",
            **_text_config(model.language, dtype, special_ids),
            "bias": False,
            "attn_implementation": "eager",
        },
        "vision_config": _vision_config(model.vision, dtype),
    }


def generation_config(special_ids: Mapping[str, int | None], stop_ids: list[int]) -> dict[str, Any]:
    """generation_config.json: greedy, and every id that ends an answer."""
    return {
        "bos_token_id": special_ids["bos"],
        "eos_token_id": stop_ids,
        "pad_token_id": special_ids["pad"],
        "do_sample": False,
    }


def _text_config(
    language: LanguageConfig, dtype: str, special_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """What Llama's and InternLM2's config classes both call by these names."""
    return {
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_query_groups,
        "hidden_act": "silu",
        "rms_norm_eps": language.rmsnorm_eps,
        **hf_rope(language.rope_theta, language.rope_scaling_factor),
        "max_position_embeddings": language.max_position_embeddings,
        "tie_word_embeddings": language.tie_word_embeddings,
        "torch_dtype": dtype,
        "bos_token_id": special_ids["bos"],
        "eos_token_id": special_ids["eos"],
        "pad_token_id": special_ids["pad"],
    }


def _vision_config(vision: VisionConfig, dtype: str) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": 3,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": vision.layernorm_eps,
        "projection_dim": vision.hidden_size,
        "torch_dtype": dtype,
    }
