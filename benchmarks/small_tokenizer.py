"""A tokenizer for models with random weights: any text becomes a few hundred ids."""

from pathlib import Path

import sentencepiece


def train_tokenizer(folder: Path) -> Path:
    """Train it and return its file, `folder/tokenizer.model`."""
    prefix = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["which modality is shown in this image"] * 50),
        model_prefix=str(prefix),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    return prefix.with_suffix(".model")
