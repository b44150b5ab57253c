"""Which file the tokenizer is. One rule for training, tools and conversion. No torch."""

import os
from pathlib import Path

from megatron_gmai.config import Config

MODEL_FILE = "tokenizer.model"


def tokenizer_file(path: str | os.PathLike[str] | None) -> Path:
    """The sentencepiece model that a flag or a checkpoint names: a file, or a folder that holds
    `tokenizer.model`. Raises ValueError if there is none."""
    if path is None:
        raise ValueError("no tokenizer is named; give --tokenizer FILE")
    file = Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"no sentencepiece model at {file}; give --tokenizer FILE or FOLDER")
    return file


def find_tokenizer(config: Config) -> Path | None:
    """The run's tokenizer: `--tokenizer`, else the one beside the start weights, the shards or the
    run's own checkpoints. None where there is no such file."""
    data, run = config.data, config.run
    given = (data.tokenizer,)
    beside = (run.llava, run.llm, data.shards, data.dset_cache_dir, run.load, run.save)
    for path in given if data.tokenizer else beside:
        try:
            return tokenizer_file(path)
        except ValueError:
            continue
    return None
