"""A small model with weights large enough that every token of a prompt matters."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megatron_gmai.config import Config, DataConfig, ModelConfig, ParallelConfig
from megatron_gmai.convert.seeded import SeededWeights
from megatron_gmai.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.training.checkpoint import Position, save_checkpoint
from tests.parallel.batches import CONFIG, MODEL
from tests.parallel.cases import Processes


def build(world: Processes, config: Config = CONFIG) -> GMAIVL:
    """The model of `config`, in eval mode, from the same weights in every layout."""
    model = world.model(config, vivid(config.model))
    return model.requires_grad_(False).eval()


def vivid(model: ModelConfig) -> Mapping[str, Tensor]:
    weights = SeededWeights(model, seed=3)
    return {name: weights[name] * (3.0 if weights[name].dim() > 1 else 1.0) for name in weights}


def config_for(tokenizer: Tokenizer, tensor_parallel: int = 1) -> Config:
    """`CONFIG` with the vocabulary of a tokenizer and room for its prompts."""
    language = dataclasses.replace(
        MODEL.language, vocab_size=tokenizer.vocab_size, max_position_embeddings=512
    )
    model = dataclasses.replace(MODEL, language=language, image_token_id=tokenizer.image_token_id)
    parallel = ParallelConfig(tensor_model_parallel_size=tensor_parallel)
    return dataclasses.replace(CONFIG, model=model, parallel=parallel)


def save_from_two_ranks(folder: Path, tokenizer_file: Path) -> None:
    """A checkpoint of the model for a tokenizer, run in a world of two."""
    config = config_for(load_tokenizer(tokenizer_file), tensor_parallel=2)
    config = dataclasses.replace(config, data=DataConfig(tokenizer=str(tokenizer_file)))
    model = build(Processes(), config)
    save_checkpoint(folder, Position(iteration=3), [model], None, config)
