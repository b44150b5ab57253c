"""A small real data set for runs of the entry script."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megatron_gmai.data.prepare import copy_tokenizer
from megatron_gmai.data.shards.build import build_shards
from tests.data.world import WORDS, mixed_records


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 samples as shards: images, two images, several turns, text only; with a tokenizer."""
    folder = tmp_path_factory.mktemp("samples")
    generator = np.random.default_rng(0)
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(" ".join(generator.choice(WORDS, 6)) for _ in range(400)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    (folder / "samples.json").write_text(json.dumps(mixed_records(folder, 24)))
    entry = {"image_dir": str(folder), "annotations": "samples.json", "sample_ratio": 1.0,
             "length": 24, "data_augment": False}  # fmt: skip
    (folder / "LIST.json").write_text(json.dumps({"samples": entry}))
    build_shards(folder / "LIST.json", folder / "shards")
    copy_tokenizer(folder / "tokenizer.model", folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="session")
def held_out(shards: Path) -> Path:
    """Two further data sets, of 24 and of 3 samples."""
    entries = {}
    for name, count in (("samples", 24), ("other", 3)):
        folder = shards.parent / f"held-out-{name}"
        folder.mkdir()
        (folder / "samples.json").write_text(json.dumps(mixed_records(folder, count)))
        entries[name] = {"image_dir": str(folder), "annotations": f"held-out-{name}/samples.json"}
    (shards.parent / "HELD_OUT.json").write_text(json.dumps(entries))
    build_shards(shards.parent / "HELD_OUT.json", shards.parent / "held-out")
    return shards.parent / "held-out"
