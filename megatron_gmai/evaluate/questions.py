"""Held-out questions, read as training reads its samples.

The file is a JSON list or JSON Lines of GMAI-VL records; image paths start at its folder. The last
assistant turn is the expected answer, everything before it is the prompt. Two further keys,
`question_type` and `class`, group the scores.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_gmai.chat_formats import chat_format
from megatron_gmai.config import DataConfig, ModelConfig
from megatron_gmai.data.images.decode import load_image
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.shards.build import check_record
from megatron_gmai.data.sources.mixture import Source
from megatron_gmai.data.sources.records import Records, read_record
from megatron_gmai.data.text.conversation import IMAGE_TAG, Conversation, parse_conversation
from megatron_gmai.data.text.template import render
from megatron_gmai.data.text.tokenizer import Tokenizer
from megatron_gmai.evaluate.generate import Prompt


@dataclass(frozen=True)
class Question:
    """One held-out sample. `text` is the last question, without the image tags."""

    number: int  # place in the file
    key: str
    text: str
    expected: str
    question_type: str
    class_name: str


@dataclass(frozen=True)
class Asked:
    """A question with the prompt that asks it."""

    question: Question
    prompt: Prompt


@dataclass(frozen=True)
class Skipped:
    """A record that cannot be asked, and why."""

    number: int
    key: str
    reason: str


class HeldOut:
    """The questions of a file, made into prompts one at a time."""

    def __init__(
        self,
        file: Path,
        data: DataConfig,
        model: ModelConfig,
        tokenizer: Tokenizer,
        max_new_tokens: int,
    ) -> None:
        """`data` gives the template and the treatment of images that the model was trained with.

        Raises ValueError if the file cannot be read or holds nothing.
        """
        self.records = Records([file])
        if not len(self.records):
            raise ValueError(f"{file} holds no questions; give --data a file with some")
        self.source = Source(file.stem, (file,), (file.parent,))
        self.template = chat_format(data.chat_template)
        self.pad_to_square = data.pad_to_square
        self.vision = model.vision
        self.tokenizer = tokenizer
        self.longest_prompt = model.language.max_position_embeddings - max_new_tokens

    def __len__(self) -> int:
        return len(self.records)

    def ask(self, number: int) -> Asked | Skipped:
        """The question at a place in the file, or why there is none."""
        _, start, size, _ = self.records.spans[number].tolist()
        record: Any = None
        try:
            record = read_record(self.source.annotation_files[0], start, size)
            record, images = check_record(record, self.source)
            conversation = parse_conversation(record, len(images))
            return self._asked(number, record, conversation, [data for _, data in images])
        except BadSample as error:
            return Skipped(number, _key(record, number), str(error))

    def _asked(
        self, number: int, record: dict[str, Any], conversation: Conversation, images: list[bytes]
    ) -> Asked:
        *before, answer = conversation.turns
        prompt = render(
            Conversation(tuple(before)), self.template, self.tokenizer, self.vision.tokens_per_image
        )
        if len(prompt.tokens) > self.longest_prompt:
            raise BadSample(
                f"the prompt has {len(prompt.tokens)} tokens; beside an answer the model has room "
                f"for {self.longest_prompt}"
            )
        side = self.vision.image_size
        pixels = torch.empty(len(images), 3, side, side, dtype=torch.uint8)
        for image, data in zip(pixels, images, strict=True):
            image.copy_(torch.from_numpy(load_image(data, side, self.pad_to_square)))
        question = Question(
            number=number,
            key=_key(record, number),
            text=before[-1].text.replace(f"{IMAGE_TAG}\n", "").strip(),
            expected=answer.text,
            question_type=str(record.get("question_type", "untyped")),
            class_name=str(record.get("class", "unnamed")),
        )
        return Asked(
            question,
            Prompt(torch.from_numpy(prompt.tokens), torch.from_numpy(prompt.image_starts), pixels),
        )


class Questions(Protocol):
    """Questions that are made into prompts one at a time."""

    def ask(self, number: int) -> Asked | Skipped: ...


def batches(
    held_out: Questions, numbers: Sequence[int], size: int
) -> Iterator[list[Asked | Skipped]]:
    """The questions of these places, `size` of like length together.

    They are sorted within windows of many batches, so memory does not grow with the file. What is
    skipped comes in a batch's list too.
    """
    window = size * 16
    for start in range(0, len(numbers), window):
        drawn = [held_out.ask(number) for number in numbers[start : start + window]]
        drawn.sort(key=lambda one: len(one.prompt.tokens) if isinstance(one, Asked) else 0)
        for first in range(0, len(drawn), size):
            yield drawn[first : first + size]


def _key(record: Any, number: int) -> str:
    named = isinstance(record, dict) and record.get("id") is not None
    return str(record["id"]) if named else f"record {number}"
