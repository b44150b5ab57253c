"""Small random models in transformers' classes, and sentencepiece models trained on the spot."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from megatron_gmai.config import (
    Config,
    DataConfig,
    LanguageConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    VisionConfig,
)
from megatron_gmai.convert.huggingface import write_pretrained
from megatron_gmai.convert.training_checkpoint import write_training_checkpoint
from megatron_gmai.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_gmai.weights import is_stored, weights
from tests.llava import random_llava

# Every size differs, so that no exchange of two dimensions goes unnoticed.
MODEL = ModelConfig(
    vision=VisionConfig(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=56,
        patch_size=7,
        image_size=28,
    ),
    language=LanguageConfig(
        num_layers=2,
        hidden_size=48,
        num_attention_heads=12,
        num_query_groups=4,
        ffn_hidden_size=80,
        vocab_size=101,
        max_position_embeddings=512,
    ),
    image_token_id=100,
)

CORPUS = (
    "what is the modality of this image? brain MR",
    "is there a fracture? yes, in the left tibia; no",
    "chest X-ray, 512 x 512; histology: H&E stain",
    "ab ba aab abab bab aba baab aabb",
    "Réponse: café, naïve. 医学 画像",
) * 20


@pytest.fixture
def model_config() -> ModelConfig:
    return MODEL


@pytest.fixture
def random_weights() -> Callable[[ModelConfig], dict[str, Tensor]]:
    """Canonical weights of a model, all different numbers; the scales of norms lie around 1."""

    def make(model: ModelConfig) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {
            name: 0.1 * torch.randn(weight.shape, generator=generator) + is_scale(name)
            for name, weight in weights(model).items()
        }

    return make


@pytest.fixture
def llava() -> LlavaForConditionalGeneration:
    """A random model of the sizes of `MODEL`, as transformers builds it."""
    return random_llava(MODEL, std=0.1)


@pytest.fixture
def saved(llava: LlavaForConditionalGeneration, tmp_path: Path) -> Path:
    """The same, as a folder."""
    folder = tmp_path / "saved"
    llava.save_pretrained(folder)
    return folder


@pytest.fixture
def train_sentencepiece(tmp_path: Path) -> Callable[..., Path]:
    """Trains a model file; keyword arguments override the trainer's settings below."""

    def train(**settings: Any) -> Path:
        stream = io.BytesIO()
        defaults: dict[str, Any] = {
            "model_type": "bpe",
            "vocab_size": 420,
            "hard_vocab_limit": False,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "user_defined_symbols": ["<|im_start|>", "<|im_end|>"],
            "minloglevel": 2,
        }
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=stream, **{**defaults, **settings}
        )
        path = tmp_path / "tokenizer.model"
        path.write_bytes(stream.getvalue())
        return path

    return train


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def is_scale(name: str) -> bool:
    return name.endswith(("norm.weight", "ln_pre.weight"))


@dataclass(frozen=True)
class Export:
    """A folder written by `write_pretrained`, and what went into it."""

    folder: Path
    tokenizer: Tokenizer
    model: ModelConfig
    weights: dict[str, Tensor]


@pytest.fixture
def export(
    tmp_path: Path,
    train_sentencepiece: Callable[..., Path],
    random_weights: Callable[[ModelConfig], dict[str, Tensor]],
) -> Callable[..., Export]:
    """Writes a random model with its tokenizer; more arguments go to `write_pretrained`."""

    def write(
        chat_template: str = "internlm2",
        sentencepiece: dict[str, Any] | None = None,
        folder: str = "export",
        language: LanguageConfig = MODEL.language,
        rope_scaling_factor: float = 1.0,
        **settings: Any,
    ) -> Export:
        tokenizer_model = train_sentencepiece(**(sentencepiece or {}))
        tokenizer = load_tokenizer(tokenizer_model)
        language = replace(
            language,
            vocab_size=tokenizer.vocab_size,
            rope_scaling_factor=rope_scaling_factor,
        )
        model = replace(MODEL, language=language, image_token_id=tokenizer.image_token_id)
        weights = random_weights(model)
        write_pretrained(
            tmp_path / folder,
            model,
            weights,
            tokenizer_model=tokenizer_model,
            special_tokens=special_tokens(tokenizer),
            reserved=tokenizer.reserved,
            chat_template=chat_template,
            dtype=torch.float32,
            **settings,
        )
        return Export(tmp_path / folder, tokenizer, model, weights)

    return write


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    return dict(tokenizer._specials)


def save_adapters(
    folder: Path,
    source: Export,
    lora: LoraConfig,
    run: RunConfig,
    changes: dict[str, Tensor] | None = None,
) -> Path:
    """The checkpoint of a run on top of `source`, its adapters random."""
    generator = torch.Generator().manual_seed(1)
    stored = {
        name: 0.3 * torch.randn(weight.shape, generator=generator)
        if weight.is_adapter
        else source.weights[name]
        for name, weight in weights(source.model, lora).items()
        if is_stored(weight, lora)
    }
    tokenizer = DataConfig(tokenizer=str(source.folder / "tokenizer.model"))
    config = Config(model=source.model, lora=lora, data=tokenizer, run=run)
    write_training_checkpoint(folder, config, {**stored, **(changes or {})}, {})
    return folder
