"""Held-out questions in GMAI-VL's own records, such as the quick start's: `SPLIT.json` in a folder.

Records of one question and its answer; `question_type` and `class` become columns. Lettered lines
below a question become its options, and what follows them (a request for the letter) is left out.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.text.conversation import IMAGE_TAG, image_names, parse_conversation
from megatron_gmai.evaluate.benchmarks.write import Row
from megatron_gmai.evaluate.native.convert import Attempt, Source, attempt
from megatron_gmai.evaluate.native.files import image_file, read_json_list, text_of

_OPTION = re.compile(r"\(?([A-Z])[.):]\s+(.+)")


def _rows(folder: Path, split: str) -> Iterator[Attempt]:
    for number, record in enumerate(read_json_list(folder / f"{split}.json")):
        yield attempt(text_of(record, "id") or str(number), _row, record, folder)


def _row(record: dict[str, Any], folder: Path) -> Row:
    names = image_names(record)
    turns = parse_conversation(record, len(names)).turns
    if len(turns) != 2:
        raise BadSample("not one question and its answer")
    question, options = split_options(turns[0].text.replace(IMAGE_TAG, "").strip())
    return Row(
        question=question,
        answer=turns[1].text,
        images=[image_file(name, folder) for name in names],
        options=options,
        columns={
            "id": text_of(record, "id"),
            "question_type": text_of(record, "question_type"),
            "category": text_of(record, "class"),
        },
    )


def split_options(text: str) -> tuple[str, list[str]]:
    """Question and options; none where lines do not go A, B and so on."""
    question, *lines = text.split("\n")
    found = [match for line in lines if (match := _OPTION.fullmatch(line))]
    letters = "".join(match[1] for match in found)
    if len(found) < 2 or not ascii_uppercase.startswith(letters):
        return text, []
    return question, [match[2] for match in found]


RECORDS = Source(
    "records", _rows, ("id", "question_type", "category"), options=26, split="held_out"
)
