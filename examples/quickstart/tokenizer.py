"""A sentencepiece model of the quick start's text, with InternLM2's special tokens."""

from collections.abc import Iterable
from pathlib import Path

import sentencepiece as spm

# InternLM2's chat and tool tokens, and the place of an image. <unk>, <s>, </s> are 0, 1, 2 there.
SPECIAL_TOKENS = (
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
    "<image>",
)


def train_tokenizer(lines: Iterable[str], output: Path, vocab_size: int = 640) -> None:
    """Train a byte-fallback BPE model and write it.

    Args:
        lines: the text, any order; the result depends on the order only through ties.
        output: folder for `tokenizer.model`.
        vocab_size: pieces, of which 256 are bytes.
    """
    with (output / "tokenizer.model").open("wb") as model:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(sorted(lines)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            # Text is kept as it is: a newline or two spaces mean something in the chat template.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=list(SPECIAL_TOKENS),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
