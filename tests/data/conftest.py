"""Fixtures: a tokenizer trained on a few words, and a writer of list files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from megatron_gmai.data.text.tokenizer import Tokenizer, load_tokenizer
from tests.data.world import WORDS


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model with InternLM2's special tokens, newlines and bytes kept."""
    generator = np.random.default_rng(0)
    text = [" ".join(generator.choice(WORDS, 6)) for _ in range(400)]
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_file)


@pytest.fixture
def write_list(tmp_path: Path, write_list_in: Callable[[Path], Callable]) -> Callable[..., Path]:
    """Writes annotations and a list file that names them; returns the list file."""
    return write_list_in(tmp_path)


@pytest.fixture(scope="session")
def write_list_in() -> Callable[[Path], Callable[..., Path]]:
    """`write_list` for a folder."""

    def write_in(folder: Path) -> Callable[..., Path]:
        def write(
            ratio: float = 1.0, name: str = "LIST.json", augment: bool = False, **sources: list[Any]
        ) -> Path:
            entries = {}
            for source, records in sources.items():
                (folder / f"{source}.json").write_text(json.dumps(records))
                entries[source] = {
                    "image_dir": str(folder),
                    "annotations": str(folder / f"{source}.json"),
                    "sample_ratio": ratio,
                    "length": len(records),
                    "data_augment": augment,
                }
            (folder / name).write_text(json.dumps(entries))
            return folder / name

        return write

    return write_in
