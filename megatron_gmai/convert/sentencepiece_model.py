"""A sentencepiece `.model` file as plain data.

Source: sentencepiece_model.proto (pieces, trainer_spec, normalizer_spec).
"""

import importlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SPACE = "\u2581"  # how sentencepiece writes a space inside pieces

Kind = Literal["normal", "unknown", "control", "user_defined", "unused", "byte"]
_KINDS: dict[int, Kind] = {
    1: "normal",
    2: "unknown",
    3: "control",
    4: "user_defined",
    5: "unused",
    6: "byte",
}


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePieceModel:
    """What decides how text becomes ids. A piece's id is its place; ids of -1 do not exist."""

    algorithm: Literal["bpe", "unigram"]
    pieces: tuple[Piece, ...]
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    byte_fallback: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    charsmap: bytes  # compiled character normalisation; empty for identity


def read_sentencepiece(path: Path, reserved: Collection[int] = ()) -> SentencePieceModel:
    """Parse a `.model` file.

    `reserved` pieces count as control pieces, as in training: whatever the file declares them to
    be, they are never matched in a text.

    Raises ValueError if there is no such file, if it is not a sentencepiece model, or if it uses
    a feature that a `tokenizer.json` cannot reproduce (word or character models, whitespace as
    suffix or not escaped, pieces switched off).
    """
    # Here, not above: only an export needs protobuf.
    proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    decode_error = importlib.import_module("google.protobuf.message").DecodeError
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name the sentencepiece model file")
    model = proto.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except decode_error as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    problems = _problems(model, proto)
    if problems:
        raise ValueError(f"{path} cannot be exported: {'; '.join(problems)}")
    return SentencePieceModel(
        algorithm="bpe" if trainer.model_type == proto.TrainerSpec.BPE else "unigram",
        pieces=tuple(
            Piece(p.piece, p.score, "control" if number in reserved else _KINDS[p.type])
            for number, p in enumerate(model.pieces)
        ),
        unk_id=_id_of_kind(model, "unknown", trainer.unk_id),
        bos_id=trainer.bos_id,
        eos_id=trainer.eos_id,
        pad_id=trainer.pad_id,
        byte_fallback=trainer.byte_fallback,
        add_dummy_prefix=normalizer.add_dummy_prefix,
        remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
        charsmap=normalizer.precompiled_charsmap,
    )


def _id_of_kind(model: Any, kind: Kind, default: int) -> int:
    return next((i for i, p in enumerate(model.pieces) if _KINDS[p.type] == kind), default)


def _problems(model: Any, proto: Any) -> list[str]:
    trainer = model.trainer_spec
    problems = []
    if not model.pieces:
        problems.append("it has no pieces")
    if trainer.model_type not in (proto.TrainerSpec.BPE, proto.TrainerSpec.UNIGRAM):
        problems.append("only bpe and unigram models work")
    if trainer.treat_whitespace_as_suffix or not model.normalizer_spec.escape_whitespaces:
        problems.append("whitespace must be an escaped prefix of words")
    if any(_KINDS[p.type] == "unused" for p in model.pieces):
        problems.append("it has pieces of type UNUSED")
    return problems
