"""What a run learns from its files before it builds: here it may have none."""

import dataclasses

from megatron_gmai.config import Config
from megatron_gmai.data.text.tokenizer import load_tokenizer
from megatron_gmai.planner.cost import with_vocabulary
from megatron_gmai.tokenizer_file import find_tokenizer


def settled(config: Config) -> Config:
    """The configuration with a vocabulary: the tokenizer's where there is one, else
    InternLM2.5's."""
    if path := find_tokenizer(config):
        size = max(config.model.language.vocab_size, load_tokenizer(str(path)).vocab_size)
        language = dataclasses.replace(config.model.language, vocab_size=size)
        model = dataclasses.replace(config.model, language=language)
        config = dataclasses.replace(config, model=model)
    return with_vocabulary(config)
