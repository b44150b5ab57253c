"""sentencepiece model + special tokens -> `tokenizer.json` of the tokenizers library.

The ids are those of training: text between two special tokens is one sentencepiece call, dummy
prefix included. Two differences stay. The name of a special token inside a raw text becomes that
token here, while training spells it out; in messages the chat template (`chat_template.py`) puts
`MARK` into such a name. And where a model normalises characters (InternLM2's does not: `identity`),
the tokenizers library treats CR LF and some combining sequences in another way than sentencepiece.
"""

import base64
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_gmai.convert.piece_literals import literal_pattern, never_best, unknown_to
from megatron_gmai.convert.sentencepiece_model import SPACE, SentencePieceModel

IMAGE_TOKEN = "<image>"
# Breaks up the names of special tokens in messages. A Unicode noncharacter: it is valid in every
# encoding and never assigned, and a text that holds it all the same has it doubled by the template.
MARK = "\ufdd0"


def tokenizer_json(
    model: SentencePieceModel, special_tokens: Mapping[str, int], answer_opening: str
) -> dict[str, Any]:
    """Content of `tokenizer.json`.

    Args:
        model: the sentencepiece model.
        special_tokens: name to id, `<image>` among them; ids may be those of pieces (which then
            take that name) or lie past the pieces.
        answer_opening: the text that the chat template puts before an answer; training encodes
            the answer apart from it, so no piece may reach across.

    Raises ValueError if two special tokens share an id, if `<image>` is missing, or if the
    character map would change a user-defined piece.
    """
    if IMAGE_TOKEN not in special_tokens:
        raise ValueError(f"the tokenizer has no {IMAGE_TOKEN} token")
    if len(set(special_tokens.values())) < len(special_tokens):
        raise ValueError(f"special tokens share ids: {dict(special_tokens)}")
    model = _with_control(model, special_tokens)
    names = _names(model, special_tokens)
    cut_out = [piece.text for piece in model.pieces if piece.kind == "user_defined"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(name, number)
            for name, number in sorted(special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": _normalizer(model),
        "pre_tokenizer": _pre_tokenizer(model, names, cut_out, answer_opening),
        "post_processor": None,
        "decoder": _decoder(model),
        "model": _bpe(model, names, bool(cut_out))
        if model.algorithm == "bpe"
        else _unigram(model, names),
    }


def added_token(name: str, number: int) -> dict[str, Any]:
    """A special token as tokenizer.json lists it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": name, **flags, "special": True}


def _with_control(
    model: SentencePieceModel, special_tokens: Mapping[str, int]
) -> SentencePieceModel:
    """The model with the pieces of special tokens declared control pieces, as in training."""
    special_ids = set(special_tokens.values())
    pieces = tuple(
        replace(piece, kind="control") if number in special_ids else piece
        for number, piece in enumerate(model.pieces)
    )
    return replace(model, pieces=pieces)


def _names(model: SentencePieceModel, special_tokens: Mapping[str, int]) -> list[str]:
    """Name of every id up to the last special token; ids that nothing uses get a filler."""
    by_id = {number: name for name, number in special_tokens.items()}
    size = max(len(model.pieces), max(by_id) + 1)
    pieces = [piece.text for piece in model.pieces]
    pieces += [f"[UNUSED_ID_{number}]" for number in range(len(pieces), size)]
    return [by_id.get(number, name) for number, name in enumerate(pieces)]


def _normalizer(model: SentencePieceModel) -> dict[str, Any]:
    """sentencepiece's normaliser: character map, whitespace, dummy prefix, escaped spaces.

    Before it the chat template's marks go. It runs on what lies between special tokens, which are
    already found by then, so a name that had a mark inside is plain text.
    """
    steps: list[dict[str, Any]] = [
        _replace(f"(?<!{MARK}){MARK}(?!{MARK})", ""),
        _replace(f"{MARK}{{2}}", MARK),
    ]
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_whitespaces:
        # At the end sentencepiece compares escaped text, so a literal U+2581 goes too.
        for pattern, content in ((r"\A +", ""), (rf"[ {SPACE}]+\z", ""), (" {2,}", " ")):
            steps.append(_replace(pattern, content))
    if model.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _pre_tokenizer(
    model: SentencePieceModel, names: list[str], cut_out: list[str], answer_opening: str
) -> dict[str, Any] | None:
    """Cuts out user-defined pieces, which sentencepiece never merges with their neighbours, the
    opening of an answer if some piece could reach over its end, and names that no text may
    match."""
    changed = [text for text in cut_out if not (text.isascii() and text.isprintable())]
    if model.charsmap and changed:
        raise ValueError(
            f"user-defined pieces {changed} do not survive the model's character map; train the "
            "tokenizer with normalization_rule_name='identity'"
        )
    patterns = [re.escape(text) for text in sorted(cut_out, key=lambda text: (-len(text), text))]
    if _reaches_into_answer(model, answer_opening):
        prefix = SPACE if model.add_dummy_prefix else ""
        patterns.append(rf"\A{prefix}{re.escape(answer_opening)}(?={prefix or '.'})")
    splits = [_split("|".join(patterns), "Isolated")] if patterns else []
    if literals := literal_pattern(model, names, ignores_merges=bool(cut_out)):
        # Only the place after the match is cut: what stands before a name may belong to it.
        splits.append(_split(literals, "MergedWithPrevious"))
    if len(splits) < 2:
        return splits[0] if splits else None
    return {"type": "Sequence", "pretokenizers": splits}


def _reaches_into_answer(model: SentencePieceModel, opening: str) -> bool:
    """Whether the last character of the opening can share a piece with the answer's first."""
    first = SPACE if model.add_dummy_prefix else ""  # "": any, a character without a piece too
    unknown = unknown_to(model)
    if unknown(opening[-1:]) and unknown(first):
        return True
    bridge = re.compile(re.escape(opening[-1:] + first) + ("" if first else r"[\s\S]"))
    return any(p.kind == "normal" and bridge.search(p.text) for p in model.pieces)


def _split(pattern: str, behavior: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": behavior,
        "invert": False,
    }


def _decoder(model: SentencePieceModel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _bpe(model: SentencePieceModel, names: list[str], cuts_out: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": names[model.unk_id],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        # Gives a cut-out user-defined piece its id although no merge leads there.
        "ignore_merges": cuts_out,
        "vocab": {name: number for number, name in enumerate(names)},
        "merges": _merges(model),
    }


def _merges(model: SentencePieceModel) -> list[list[str]]:
    """Every way to join two pieces into a third, best score of the third first.

    sentencepiece merges the adjacent pair whose union has the best score; only ordinary pieces
    take part.
    """
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == "normal"}
    order = sorted(scores, key=lambda text: -scores[text])
    return [
        [text[:cut], text[cut:]]
        for text in order
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]


def _unigram(model: SentencePieceModel, names: list[str]) -> dict[str, Any]:
    scores = [piece.score for piece in model.pieces]
    scores += [0.0] * (len(names) - len(scores))
    for number, score in never_best(model, names).items():
        scores[number] = score
    return {
        "type": "Unigram",
        "unk_id": model.unk_id,
        "vocab": [[name, score] for name, score in zip(names, scores, strict=True)],
        "byte_fallback": model.byte_fallback,
    }
