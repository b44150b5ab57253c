"""Chat templates: a conversation becomes token ids, with the answers marked as supervised.

Every run of text between two special tokens is encoded by one tokenizer call, and the answer by a
call of its own: at inference the prompt ends where the answer begins, so the ids must split there.
No template puts bos first. An image is `tokens_per_image` copies of the image token.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_gmai.chat_formats import ChatFormat
from megatron_gmai.config import IGNORE_INDEX
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.text.conversation import IMAGE_TAG, Conversation, Turn
from megatron_gmai.data.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rendered:
    """One sample of L tokens.

    `labels` are not shifted: `labels[t]` is `tokens[t]` where supervised, else -100.
    `image_starts` has the first placeholder of each image, `answer_ends` the length of the sample
    if it were to end after each answer.
    """

    tokens: np.ndarray  # int64 [L]
    labels: np.ndarray  # int64 [L]
    image_starts: np.ndarray  # int64 [images]
    answer_ends: tuple[int, ...]
    tokens_per_image: int

    @property
    def images_end(self) -> int:
        """Position after the last image; 0 without images."""
        if not len(self.image_starts):
            return 0
        return int(self.image_starts[-1]) + self.tokens_per_image


class _Writer:
    """Collects ids; text waits until a special token or the end of a call's run closes it."""

    def __init__(self, tokenizer: Tokenizer, tokens_per_image: int) -> None:
        self.tokenizer, self.tokens_per_image = tokenizer, tokens_per_image
        # Arrays, because an image's hundreds of equal ids are then copied as one block.
        self.tokens, self.labels = array("q"), array("q")
        self.image_starts: list[int] = []
        self._text = ""

    def text(self, text: str) -> None:
        self._text += text

    def piece(self, piece: str) -> None:
        if piece.startswith("<|"):
            self._append(array("q", [self.tokenizer.special_id(piece)]))
        else:
            self.text(piece)

    def image(self) -> None:
        self.flush()
        self.image_starts.append(len(self.tokens))
        self._append(array("q", [self.tokenizer.image_token_id]) * self.tokens_per_image)

    def answer(self, text: str, end: str) -> None:
        self.flush()
        ids = array("q", [*self.tokenizer.encode(text), self.tokenizer.special_id(end)])
        self.tokens += ids
        self.labels += ids

    def flush(self) -> None:
        text, self._text = self._text, ""
        if text:
            self._append(array("q", self.tokenizer.encode(text)))

    def _append(self, ids: "array[int]") -> None:
        self.flush()
        self.tokens += ids
        self.labels += array("q", [IGNORE_INDEX]) * len(ids)


def render(
    conversation: Conversation, template: ChatFormat, tokenizer: Tokenizer, tokens_per_image: int
) -> Rendered:
    """Ids, labels and image positions of a conversation.

    A conversation that ends with a user turn gives a prompt: it ends with the opening of the
    answer to be generated, and nothing after it.
    """
    writer = _Writer(tokenizer, tokens_per_image)
    answer_ends = []
    for turn in conversation.turns:
        _write_turn(writer, template, turn)
        if turn.role == "assistant":
            answer_ends.append(len(writer.tokens))
            writer.text(template.separator)
    writer.flush()
    return Rendered(
        tokens=np.array(writer.tokens, dtype=np.int64),
        labels=np.array(writer.labels, dtype=np.int64),
        image_starts=np.array(writer.image_starts, dtype=np.int64),
        answer_ends=tuple(answer_ends),
        tokens_per_image=tokens_per_image,
    )


def _write_turn(writer: _Writer, template: ChatFormat, turn: Turn) -> None:
    if turn.role == "assistant":
        writer.answer(turn.text, template.end_of_answer)
        return
    before, after = template.system if turn.role == "system" else template.user
    for piece in before:
        writer.piece(piece)
    for text, image in _content(turn):
        if image:
            writer.image()
        else:
            writer.text(text)
    for piece in after:
        writer.piece(piece)
    if turn.role == "user":
        for piece in template.answer_opening:
            writer.piece(piece)


def _content(turn: Turn) -> Iterator[tuple[str, bool]]:
    """Texts and images of a turn, in order: (text, False) or ("", True)."""
    if turn.role != "user":
        yield turn.text, False
        return
    for number, text in enumerate(turn.text.split(IMAGE_TAG)):
        if number:
            yield "", True
        if text:
            yield text, False


def fit(sample: Rendered, max_length: int) -> Rendered:
    """The sample itself, or its longest beginning of at most `max_length` tokens that ends after
    an answer and holds every image whole. Raises BadSample if there is none."""
    if len(sample.tokens) <= max_length:
        return sample
    kept = [end for end in sample.answer_ends if sample.images_end <= end <= max_length]
    if not kept:
        raise BadSample(
            f"{len(sample.tokens)} tokens, more than --max-length {max_length}, and no turn ends "
            f"before it with all {len(sample.image_starts)} image(s) and an answer"
        )
    end = kept[-1]
    ends = tuple(answer for answer in sample.answer_ends if answer <= end)
    return Rendered(
        sample.tokens[:end], sample.labels[:end], sample.image_starts, ends, sample.tokens_per_image
    )
