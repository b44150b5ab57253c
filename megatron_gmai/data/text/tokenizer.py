"""The sentencepiece tokenizer, and the special tokens that a chat template needs."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from megatron_gmai.data.text.pieces import as_control
from megatron_gmai.tokenizer_file import MODEL_FILE, tokenizer_file

IMAGE_TOKEN = "<image>"
CONFIG_FILE = "tokenizer_config.json"
# Texts between special tokens repeat: short ones are remembered, so many of them.
SHORT, MOST_SHORT = 16, 4096
MOST_IDS = 2**24  # an embedding gets rows for all of them
# InternLM2's model file holds unnamed pieces where its chat models put their special tokens.
INTERNLM2_PIECES = {
    "<|im_start|>": "[UNUSED_TOKEN_146]",
    "<|im_end|>": "[UNUSED_TOKEN_145]",
    "<|action_start|>": "[UNUSED_TOKEN_144]",
    "<|action_end|>": "[UNUSED_TOKEN_143]",
    "<|interpreter|>": "[UNUSED_TOKEN_142]",
    "<|plugin|>": "[UNUSED_TOKEN_141]",
}

# `<|im_end|>`, `[UNUSED_TOKEN_145]`, `<unused7>`, `<reserved_102>`, `<extra_id_0>`, `<image>`; and
# `<0x0A>`, `<s>`, `<unk>` where they are not what they are called.
RESERVED = re.compile(
    r"<\|.*\|>|\[(?:UNUSED|unused)[^\]]*\]|</?s>|<(?:image|pad|unk|mask|cls|sep|bos|eos)>"
    r"|<(?:unused|reserved|extra_id|special|0x)[^>]*>|\[(?:PAD|UNK|CLS|SEP|MASK|INST|/INST)\]",
    re.DOTALL,
)
ENCODING = b"2"  # another one when the same model gives other ids


class Tokenizer:
    """Text to ids and back.

    Special tokens come from the model's own pieces, from `added` (name to id, as in a
    `tokenizer_config.json`), or from InternLM2's unnamed pieces. `<image>` is appended as the last
    id when nothing provides it.
    """

    def __init__(self, model: bytes, added: dict[str, int] | None = None) -> None:
        self._model = model
        self._added = dict(added or {})
        self._pieces = sentencepiece.SentencePieceProcessor()
        self._pieces.LoadFromSerializedProto(model)
        reserved = {i for i in range(self._pieces.GetPieceSize()) if _is_reserved(self._pieces, i)}
        reserved |= {i for i in self._added.values() if i < self._pieces.GetPieceSize()}
        self._reserved = {i: self._pieces.IdToPiece(i) for i in reserved}
        size = max([self._pieces.GetPieceSize(), *(i + 1 for i in self._added.values())])
        self._specials = {**self._model_specials(), **self._added}
        if IMAGE_TOKEN not in self._specials:
            self._specials[IMAGE_TOKEN] = size
            size += 1
        self.vocab_size = size
        self.image_token_id = self._specials[IMAGE_TOKEN]
        self.bos_id = self._pieces.bos_id()
        self.eos_id = self._pieces.eos_id()
        self.pad_id = self._pieces.pad_id() if self._pieces.pad_id() >= 0 else self.eos_id
        self._short: dict[str, list[int]] = {}
        # From here on no text can match a reserved piece, whatever the model declares it to be.
        self._pieces.LoadFromSerializedProto(as_control(model, reserved))

    @property
    def special_tokens(self) -> dict[str, int]:
        """Every special token by name: what the chat templates and an export need."""
        return dict(self._specials)

    @property
    def reserved(self) -> frozenset[int]:
        """Pieces that no text can match: an export declares them control pieces too."""
        return frozenset(self._reserved)

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same text could give other ids."""
        digest = hashlib.sha256(self._model + ENCODING)
        digest.update(json.dumps(sorted(self._specials.items())).encode())
        return digest.hexdigest()[:16]

    def special_id(self, name: str) -> int:
        """The id of a special token. Raises ValueError if the tokenizer has none of that name."""
        if name not in self._specials:
            raise ValueError(
                f"the tokenizer has no token {name!r}; choose the --chat-template that belongs to "
                f"it, or put a {CONFIG_FILE} with 'added_tokens_decoder' beside {MODEL_FILE}"
            )
        return self._specials[name]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without bos: sentencepiece's own, but never one of a special or
        reserved piece. Their names in a text are spelled out like any other word, so that no sample
        can forge the end of a turn."""
        if len(text) > SHORT:
            return self._pieces.EncodeAsIds(text)
        if text not in self._short and len(self._short) < MOST_SHORT:
            self._short[text] = self._pieces.EncodeAsIds(text)
        return list(self._short.get(text) or self._pieces.EncodeAsIds(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens written by name."""
        names = {**self._reserved, **{number: name for name, number in self._specials.items()}}
        parts: list[str] = []
        run: list[int] = []
        for number in ids:
            if number in names:
                parts += [self._pieces.DecodeIds(run), names[number]]
                run = []
            else:
                run.append(int(number))
        return "".join([*parts, self._pieces.DecodeIds(run)])

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes, dict[str, int]]]:
        return Tokenizer, (self._model, self._added)

    def _model_specials(self) -> dict[str, int]:
        pieces = self._pieces
        found = {
            pieces.IdToPiece(i): i for i in range(pieces.GetPieceSize()) if _is_special(pieces, i)
        }
        unknown = pieces.unk_id()
        for name, piece in INTERNLM2_PIECES.items():
            number = pieces.PieceToId(piece)
            if name not in found and number != unknown:
                found[name] = number
        return found


def _is_special(pieces: sentencepiece.SentencePieceProcessor, number: int) -> bool:
    piece = pieces.IdToPiece(number)
    marked = piece.startswith("<|") and piece.endswith("|>")
    return pieces.IsControl(number) or marked or piece == IMAGE_TOKEN


def _is_reserved(pieces: sentencepiece.SentencePieceProcessor, number: int) -> bool:
    """Whether a piece is not meant to come from text: control pieces, and those that models keep
    for later or for their chats, though many declare them to be text (`user defined`)."""
    named = RESERVED.fullmatch(pieces.IdToPiece(number))
    if pieces.IsByte(number) or pieces.IsUnknown(number):  # never matched by name
        return False
    return named is not None or pieces.IsControl(number)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a sentencepiece model file, or a folder that holds `tokenizer.model`.

    Raises ValueError if there is none, or if the file is not a sentencepiece model.
    """
    file = tokenizer_file(path)
    try:
        return Tokenizer(file.read_bytes(), _added_tokens(file.parent / CONFIG_FILE))
    except RuntimeError as error:  # its text names lines of sentencepiece's own source
        size = file.stat().st_size
        raise ValueError(
            f"{file} is not a sentencepiece model ({size} bytes); a download that is a web page or "
            "a Git LFS pointer has to be fetched again"
        ) from error
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer {file}: {error.strerror}") from error


def _added_tokens(file: Path) -> dict[str, int]:
    """Special tokens that a Hugging Face tokenizer configuration adds to the model's pieces."""
    if not file.is_file():
        return {}
    try:
        entries = json.loads(file.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        added = {entry["content"]: int(number) for number, entry in entries.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is not a tokenizer configuration: {error}") from error
    for name, number in added.items():
        if not isinstance(name, str) or not name or not 0 <= number < MOST_IDS:
            raise ValueError(f"{file}: token {name!r} of id {number}; ids go up to {MOST_IDS - 1}")
    return added
