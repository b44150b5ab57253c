"""A model of given sizes with random weights, as transformers builds it."""

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from megatron_gmai.config import ModelConfig


def random_llava(sizes: ModelConfig, std: float) -> LlavaForConditionalGeneration:
    """All parameters are drawn with `std`: large enough, every part of the model matters."""
    vision, language = sizes.vision, sizes.language
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            num_hidden_layers=vision.num_layers,
            hidden_size=vision.hidden_size,
            num_attention_heads=vision.num_attention_heads,
            intermediate_size=vision.ffn_hidden_size,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
            hidden_act="quick_gelu",
        ),
        text_config=LlamaConfig(
            num_hidden_layers=language.num_layers,
            hidden_size=language.hidden_size,
            num_attention_heads=language.num_attention_heads,
            num_key_value_heads=language.num_query_groups,
            intermediate_size=language.ffn_hidden_size,
            vocab_size=language.vocab_size,
            rms_norm_eps=language.rmsnorm_eps,
            rope_theta=language.rope_theta,
            max_position_embeddings=language.max_position_embeddings,
        ),
        image_token_index=sizes.image_token_id,
        image_seq_length=vision.tokens_per_image,
    )
    model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model
