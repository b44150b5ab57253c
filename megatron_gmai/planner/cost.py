"""Floating-point operations of GMAI-VL: of a forward pass, and how often each part is passed.

A product of [m, k] and [k, n] has 2 m k n. Causal attention counts the half of the scores that is
computed. What a backward pass costs depends on what is trained: a gradient of the input (as much as
the forward pass) and, for trained weights, of the weights (as much again).
"""

import dataclasses
from dataclasses import dataclass

from megatron_gmai.config import Config, LanguageConfig, ModelConfig

INTERNLM2_VOCABULARY = 92_544
TEXT_PER_IMAGE = 96  # tokens of a typical question and answer about an image


@dataclass(frozen=True)
class Load:
    """What one pack holds: `length` positions in `segments` samples of equal length, `images`."""

    length: int
    segments: float
    images: float

    @property
    def squares(self) -> float:
        """Sum of the squared lengths of the segments."""
        return self.length**2 / self.segments


def with_vocabulary(config: Config) -> Config:
    """The configuration with InternLM2.5's vocabulary, where no tokenizer has set one."""
    if config.model.language.vocab_size:
        return config
    language = dataclasses.replace(config.model.language, vocab_size=INTERNLM2_VOCABULARY)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, language=language))


def typical_images(config: Config) -> int:
    """Images of a pack that is full of samples with one image each."""
    return config.data.max_length // (config.model.vision.tokens_per_image + TEXT_PER_IMAGE)


def load_of(config: Config, images_per_pack: float) -> Load:
    """A full pack with so many images, each in a sample of its own."""
    return Load(config.data.max_length, max(1.0, images_per_pack), images_per_pack)


def layer_products(language: LanguageConfig) -> int:
    """Operations of a decoder layer's matrix products for one token."""
    head = language.hidden_size // language.num_attention_heads
    qkv = (language.num_attention_heads + 2 * language.num_query_groups) * head
    inner = language.num_attention_heads * head + 3 * language.ffn_hidden_size
    return 2 * language.hidden_size * (qkv + inner)


def layer_attention(language: LanguageConfig, squares: float) -> float:
    """Operations of a decoder layer's causal attention over segments."""
    return 2 * squares * language.hidden_size


def output_products(language: LanguageConfig) -> int:
    """Operations of the output layer for one token."""
    return 2 * language.hidden_size * language.vocab_size


def tower_flops(model: ModelConfig) -> float:
    """Operations of the vision tower for one image."""
    vision = model.vision
    tokens, hidden = vision.tokens_per_image + 1, vision.hidden_size
    layer = 2 * tokens * hidden * (4 * hidden + 2 * vision.ffn_hidden_size)
    attention = 4 * tokens**2 * hidden
    patches = 2 * vision.tokens_per_image * hidden * 3 * vision.patch_size**2
    return vision.layers_used * (layer + attention) + patches


def projector_flops(model: ModelConfig) -> int:
    """Operations of the projector for one image."""
    inside, outside = model.vision.hidden_size, model.language.hidden_size
    return 2 * model.vision.tokens_per_image * (inside * outside + outside * outside)


@dataclass(frozen=True)
class Passes:
    """Backward passes of each part, in units of its forward pass.

    Adapters need the gradients of their tower's activations but none of its weights'; their own
    products, of rank r instead of H, are left out.
    """

    tower: int
    projector: int
    language: int

    @classmethod
    def of(cls, config: Config) -> "Passes":
        train, lora = config.train, config.lora.llm_use_lora
        tower = 0 if train.freeze_vit else 1 if config.lora.vit_use_lora else 2
        projector = (0 if train.freeze_projector else 1) + (0 if train.freeze_vit else 1)
        # Gradients pass through the language model unless nothing before it is trained.
        through = 1 if lora or not (train.freeze_vit and train.freeze_projector) else 0
        weights = 0 if train.freeze_llm or lora else 1
        return cls(tower, projector, max(through, weights) + weights)


def image_flops(config: Config) -> float:
    """Operations for one image, forward and backward."""
    passes, model = Passes.of(config), config.model
    return (1 + passes.tower) * tower_flops(model) + (1 + passes.projector) * projector_flops(model)


def layer_flops(config: Config, load: Load) -> float:
    """Operations of a decoder layer for one pack, forward and backward."""
    language = config.model.language
    forward = load.length * layer_products(language) + layer_attention(language, load.squares)
    return (1 + Passes.of(config).language) * forward


def output_flops(config: Config, load: Load) -> float:
    """Operations of the output layer for one pack, forward and backward."""
    passes = 1 + Passes.of(config).language
    return passes * load.length * output_products(config.model.language)


def step_flops(config: Config, tokens: int, images: int, samples: int) -> float:
    """Model FLOPs of a step with the vision tower and without recomputation, over all ranks.

    Padding does not count: it is work only where other ranks depend on its size. Samples are taken
    as equally long.
    """
    language, passes = config.model.language, 1 + Passes.of(config).language
    products = language.num_layers * layer_products(language) + output_products(language)
    squares = tokens**2 / max(1, samples)
    attention = language.num_layers * layer_attention(language, squares)
    return passes * (tokens * products + attention) + images * image_flops(config)
