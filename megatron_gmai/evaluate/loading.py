"""What a checkpoint's own configuration says about using its model."""

import argparse
import dataclasses

from megatron_gmai.config import Config, ParallelConfig, TrainConfig
from megatron_gmai.data.text.tokenizer import Tokenizer, load_tokenizer


def for_evaluation(
    config: Config, device: str, dtype: str, tensor_parallel: int = 1, pipeline_parallel: int = 1
) -> Config:
    """The trained model and its treatment of data, in another layout and without training."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor_parallel, pipeline_model_parallel_size=pipeline_parallel
    )
    run = dataclasses.replace(
        config.run,
        device=device,
        dtype=dtype,
        # Another machine may lack what training was told to use.
        transformer_impl="auto",
        attention_backend="auto",
    )
    return dataclasses.replace(config, parallel=parallel, train=TrainConfig(), run=run)


def add_layout_flags(flags: argparse.ArgumentParser) -> None:
    """How many ranks share a copy of the model, by Megatron's names."""
    flags.add_argument(
        "--tensor-model-parallel-size",
        "--tp",
        type=int,
        default=1,
        help="ranks that share each layer (1)",
    )
    flags.add_argument(
        "--pipeline-model-parallel-size",
        "--pp",
        type=int,
        default=1,
        help="ranks that share out the layers (1)",
    )


def tokenizer_for(config: Config, given: str | None) -> Tokenizer:
    """The tokenizer that was given or that the run used. Raises ValueError for another model's."""
    path = given or config.data.tokenizer
    if path is None:
        raise ValueError("the checkpoint names no tokenizer; give --tokenizer FILE")
    tokenizer, model = load_tokenizer(path), config.model
    too_large = tokenizer.vocab_size > model.language.vocab_size
    if too_large or tokenizer.image_token_id != model.image_token_id:
        raise ValueError(
            f"the tokenizer {path} has {tokenizer.vocab_size} ids and <image> as number "
            f"{tokenizer.image_token_id}; the model has {model.language.vocab_size} and "
            f"{model.image_token_id}. Give --tokenizer the file that the model was trained with."
        )
    return tokenizer
