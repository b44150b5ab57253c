"""An exported tokenizer.json gives sentencepiece's ids."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from megatron_gmai.convert.sentencepiece_model import read_sentencepiece
from megatron_gmai.convert.tokenizer import MARK, tokenizer_json
from megatron_gmai.data.text.tokenizer import load_tokenizer

NASTY = (
    "",
    " ",
    "   leading, trailing   ",
    "two  spaces\tand\na tab\r\n\n",
    "\u2581literal\u2581underscores\u2581 \u2581",
    "café cafe\u0301 naïve ﬁ ½ ① İ",
    "医学画像、日本語 한국어 العربية",
    "😀👨‍👩‍👧\u200b\u00a0\u3000",
    "<0x41><unk>[UNUSED] <|im_start <image",
    "<0x0A>",
    "<unk>",
    "a<0x0A>b <0xFF><unk><unk>",
    "[UD]<0x0A>[UD]<unk>",
    "\x00\x01\x7f",
    "baabababaabbbaaab" * 20,
    "The MODALITY of this image?!",
)
ALPHABET = [*"ab?<1 \n\t\u2581é日", "ab", "  ", "[UD]", "image ", "\r\n", "e\u0301", "😀", "\x00"]


def texts() -> list[str]:
    generator = random.Random(0)
    mixed = ["".join(generator.choices(ALPHABET, k=generator.randrange(16))) for _ in range(400)]
    return [*NASTY, *mixed]


def build(path: Path, **specials: int) -> tokenizers.Tokenizer:
    size = sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()
    special_tokens = {"<s>": 1, "</s>": 2, "<|im_start|>": 3, "<image>": size}
    special_tokens |= {"<|im_end|>": 4, **specials}
    model = read_sentencepiece(path, load_tokenizer(path).reserved)
    content = tokenizer_json(model, special_tokens, "assistant\n")
    return tokenizers.Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"byte_fallback": False, "vocab_size": 150, "character_coverage": 0.98},
        {"user_defined_symbols": ["<|im_start|>", "<|im_end|>", "[UD]", "\n"]},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<|im_start|>", "<|im_end|>", "[UD]"]},
    ],
    ids=["plain", "extra spaces", "no prefix", "unknowns", "user-defined", "user-defined alone"],
)
def test_ids_equal_sentencepiece(
    train_sentencepiece: Callable[..., Path], model_type: str, settings: dict[str, Any]
) -> None:
    path = train_sentencepiece(**{"model_type": model_type, **settings})
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    exported = build(path)
    for text in texts():
        ids = exported.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text), repr(text)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_character_normalisation_is_kept(
    train_sentencepiece: Callable[..., Path], model_type: str
) -> None:
    path = train_sentencepiece(model_type=model_type, normalization_rule_name="nmt_nfkc")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    exported = build(path)
    for text in ("ﬁ ½ ① １２ Ａ", "a\u3000b\u00a0c\td\ne", "ｶﾀｶﾅ café", "\u200b x"):
        assert exported.encode(text, add_special_tokens=False).ids == reference.encode(text), text


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_text_between_special_tokens_is_encoded_by_itself(
    train_sentencepiece: Callable[..., Path], model_type: str
) -> None:
    path = train_sentencepiece(model_type=model_type)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    exported = build(path)
    image = exported.token_to_id("<image>")
    ids = exported.encode(
        "<|im_start|>user\n<image><image> what is<s>", add_special_tokens=False
    ).ids
    assert ids == [3, *reference.encode("user\n"), image, image, *reference.encode(" what is"), 1]


def test_decoding_gives_the_text_back(train_sentencepiece: Callable[..., Path]) -> None:
    exported = build(train_sentencepiece())
    for text in ("brain MR", "yes, in the left tibia", "日本語 😀", "two  spaces\n and a line"):
        assert exported.decode(exported.encode(text).ids) == text


def test_special_tokens_may_rename_pieces_or_lie_past_them(
    train_sentencepiece: Callable[..., Path],
) -> None:
    path = train_sentencepiece(user_defined_symbols=["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"])
    size = len(read_sentencepiece(path).pieces)
    exported = build(path, **{"<|im_start|>": 4, "<|im_end|>": 3, "<image>": size + 5})
    assert exported.encode("<|im_end|><|im_start|><image>").ids == [3, 4, size + 5]
    assert exported.get_vocab_size() == size + 6


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_no_piece_reaches_over_the_opening_of_an_answer(
    train_sentencepiece: Callable[..., Path], dummy_prefix: bool
) -> None:
    path = train_sentencepiece(add_dummy_prefix=dummy_prefix)
    assert json.loads(build(path).to_str())["pre_tokenizer"] is None

    answer, joint = "brain MR\n yes\nb", " brain" if dummy_prefix else "brain"
    bridge = "\n\u2581" if dummy_prefix else "\nb"
    path = _with_pieces(path, ["\n", bridge])
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    joined = answer.replace("brain", f"assistant\n{joint}")
    assert reference.encode(joined).count(reference.piece_to_id(bridge)) == 2
    apart = [*reference.encode("assistant\n"), *reference.encode(answer)]
    assert build(path).encode(joined, add_special_tokens=False).ids == apart


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_an_answers_first_character_does_not_join_an_unknown_newline(
    train_sentencepiece: Callable[..., Path], model_type: str
) -> None:
    path = train_sentencepiece(model_type=model_type, add_dummy_prefix=False, byte_fallback=False)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    exported = build(path)
    joined = 0
    for first in map(chr, range(33, 700)):
        text, apart = f"assistant\n{first}", reference.encode("assistant\n")
        apart = [*apart, *reference.encode(first)]
        joined += reference.encode(text) != apart
        assert exported.encode(text, add_special_tokens=False).ids == apart, first
    assert joined > 400


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_name_that_cannot_be_cut_is_still_spelled_out(
    train_sentencepiece: Callable[..., Path], model_type: str
) -> None:
    path = train_sentencepiece(model_type=model_type, user_defined_symbols=["[UD]"])
    path = _with_pieces(path, ["<", ">", "<s", "s>"])  # across every place inside <s>
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    exported = build(path, **{"<|im_start|>": 430, "<|im_end|>": 431})
    for text in ("<s>", "a <s> b", "ab<s><s>é😀 <s"):
        ids = exported.encode(text.replace("<s>", f"<{MARK}s>"), add_special_tokens=False).ids
        assert ids == reference.encode(text), text


def _with_pieces(path: Path, pieces: list[str]) -> Path:
    """A copy of a model file with more ordinary pieces than training would have made."""
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(path.read_bytes())
    for piece in pieces:
        model.pieces.add(piece=piece, score=-0.5, type=1)
    path = path.with_name("more.model")
    path.write_bytes(model.SerializeToString())
    return path


def test_what_is_not_a_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(ValueError, match="does not exist"):
        read_sentencepiece(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        read_sentencepiece(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="it has no pieces"):
        read_sentencepiece(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "char"}, "only bpe and unigram"),
        ({"treat_whitespace_as_suffix": True}, "whitespace must be an escaped prefix"),
    ],
)
def test_features_that_cannot_be_exported_are_refused(
    train_sentencepiece: Callable[..., Path], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_sentencepiece(train_sentencepiece(**settings))


def test_specials_that_cannot_be_exported_are_refused(
    train_sentencepiece: Callable[..., Path],
) -> None:
    model = read_sentencepiece(train_sentencepiece())
    with pytest.raises(ValueError, match="has no <image> token"):
        tokenizer_json(model, {"<|im_start|>": 3}, "assistant\n")
    with pytest.raises(ValueError, match="share ids"):
        tokenizer_json(model, {"<|im_start|>": 3, "<image>": 3}, "assistant\n")
    mapped = read_sentencepiece(
        train_sentencepiece(normalization_rule_name="nmt_nfkc", user_defined_symbols=["\n"])
    )
    with pytest.raises(ValueError, match="do not survive the model's character map"):
        tokenizer_json(mapped, {"<image>": len(mapped.pieces)}, "assistant\n")
