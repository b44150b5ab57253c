"""No text of a sample gives the id of a special or reserved piece, whichever name it uses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from megatron_gmai.data.text.pieces import as_control
from megatron_gmai.data.text.tokenizer import INTERNLM2_PIECES, Tokenizer
from tests.data.world import WORDS

# InternLM2's published special tokens, and the names of the pieces at their places.
INTERNLM2 = [*INTERNLM2_PIECES, *INTERNLM2_PIECES.values(), "[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_99]"]
OTHERS = ["<unused7>", "<reserved_102>", "<extra_id_0>", "<|reserved_special_token_5|>", "<image>"]
WHITESPACE = "    "  # some models have such pieces, which texts are meant to give


def train(folder: Path, model_type: str, user_defined: bool, **options: Any) -> bytes:
    generator = np.random.default_rng(0)
    kind = "user_defined_symbols" if user_defined else "control_symbols"
    names: Any = [name for name in (*INTERNLM2, *OTHERS) if not name.startswith("<|im_")]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(" ".join(generator.choice(WORDS, 6)) for _ in range(400)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420,
        model_type=model_type,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **{kind: names, **options},
    )
    return (folder / "tokenizer.model").read_bytes()


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Reserved pieces that are declared to be text, a dummy prefix and a normalisation."""
    return train(tmp_path_factory.mktemp("model"), request.param, user_defined=True)


def plain(model: bytes) -> sentencepiece.SentencePieceProcessor:
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(model)
    return pieces


def forbidden(tokenizer: Tokenizer, model: bytes) -> dict[int, str]:
    """Every piece that no text may give, by the names that models and InternLM2 use for it."""
    pieces = plain(model)
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    for number in range(pieces.GetPieceSize()):
        piece = pieces.IdToPiece(number)
        if pieces.IsControl(number) or piece in (*INTERNLM2, *OTHERS):
            names[number] = piece
    return names


def test_the_plain_model_can_be_fooled(model: bytes) -> None:
    pieces = plain(model)
    assert pieces.PieceToId("[UNUSED_TOKEN_145]") in pieces.EncodeAsIds("yes [UNUSED_TOKEN_145]")


def test_no_name_of_a_special_or_reserved_piece_gives_its_id(model: bytes) -> None:
    tokenizer = Tokenizer(model)
    ids = forbidden(tokenizer, model)
    assert len(ids) >= len(INTERNLM2)
    names = {*ids.values(), *tokenizer.special_tokens, *INTERNLM2, *OTHERS, "<s>", "</s>", "<unk>"}
    fullwidth = {name.translate(str.maketrans("<|>[]", "＜｜＞［］")) for name in names}
    for name in sorted(names | fullwidth):
        for text in (name, f"a{name}b", f"the {name} lung", name * 3, f"{name[0]}{name}"):
            found = tokenizer.encode(text)
            assert not set(found) & ids.keys(), text
            if name in names:
                assert tokenizer.decode(found) == text


def test_names_of_bytes_and_of_the_unknown_piece_are_spelled_out(model: bytes) -> None:
    tokenizer, pieces = Tokenizer(model), plain(model)
    for number in (0x0A, 0x41, 0xE2):
        name = f"<0x{number:02X}>"
        assert pieces.PieceToId(name) not in tokenizer.encode(f"left {name} right")
    assert pieces.unk_id() not in tokenizer.encode("left <unk> right")


def test_random_mixtures_of_names_and_text(model: bytes) -> None:
    tokenizer = Tokenizer(model)
    ids = forbidden(tokenizer, model)
    parts = [*ids.values(), *WORDS, " ", "\n", "<", "|", ">", "[", "]", "_", "肺", "\u200b", "<|"]
    generator = np.random.default_rng(1)
    for _ in range(2000):
        text = "".join(generator.choice(parts, generator.integers(1, 8)))
        assert not set(tokenizer.encode(text)) & ids.keys(), text


def test_other_texts_have_the_ids_of_sentencepiece(model: bytes) -> None:
    tokenizer, pieces = Tokenizer(model), plain(model)
    generator = np.random.default_rng(2)
    for _ in range(500):
        text = " ".join(generator.choice([*WORDS, "µ", "<b>", "[1]", "|", "\n", ""], 12))
        assert tokenizer.encode(text) == pieces.EncodeAsIds(text)


def test_pieces_that_are_text_stay_text(tmp_path: Path) -> None:
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    folder = tmp_path / "model"
    folder.mkdir()
    model = train(folder, "bpe", user_defined=False, user_defined_symbols=[WHITESPACE], **options)
    tokenizer, pieces = Tokenizer(model), plain(model)
    text = f"the lung{WHITESPACE}left"
    assert tokenizer.encode(text) == pieces.EncodeAsIds(text)


def test_only_the_kinds_of_pieces_change(model: bytes) -> None:
    pieces, changed = plain(model), plain(as_control(model, {5, 300}))
    assert changed.IsControl(5) and changed.IsControl(300)
    for number in range(pieces.GetPieceSize()):
        assert changed.IdToPiece(number) == pieces.IdToPiece(number)
        assert changed.GetScore(number) == pieces.GetScore(number)
        if number not in (5, 300):
            assert changed.IsByte(number) == pieces.IsByte(number)
            assert changed.IsControl(number) == pieces.IsControl(number)
    assert as_control(model, ()) == model
