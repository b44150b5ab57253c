"""VQA-RAD: 451 test questions.

Either the Hub's `flaviagiammarino/vqa-rad` (`data/test-*.parquet`: image, question, answer), or the
authors' files: `VQA_RAD Dataset Public.json`, whose test questions have a `phrase_type` that begins
with "test", and `VQA_RAD Image Folder`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_gmai.evaluate.benchmarks.write import Row
from megatron_gmai.evaluate.native.convert import Attempt, Source, attempt
from megatron_gmai.evaluate.native.files import (
    embedded_image,
    image_file,
    parquet_files,
    read_json_list,
    read_parquet,
    text_of,
)

_PUBLIC = "VQA_RAD Dataset Public.json"
_IMAGES = "VQA_RAD Image Folder"


def _rows(folder: Path, split: str) -> Iterator[Attempt]:
    if (folder / _PUBLIC).is_file():
        for record in read_json_list(folder / _PUBLIC):
            if text_of(record, "phrase_type").startswith(split):
                yield attempt(text_of(record, "qid"), _from_authors, record, folder)
        return
    for number, record in enumerate(read_parquet(parquet_files(folder, split))):
        yield attempt(str(number), from_hub, record)


def _from_authors(record: dict[str, Any], folder: Path) -> Row:
    return Row(
        question=text_of(record, "question"),
        answer=text_of(record, "answer"),
        images=[image_file(record.get("image_name"), folder / _IMAGES)],
        columns={
            "id": text_of(record, "qid"),
            "answer_type": text_of(record, "answer_type"),
            "question_type": text_of(record, "question_type"),
            "organ": text_of(record, "image_organ"),
            "phrase_type": text_of(record, "phrase_type"),
        },
    )


def from_hub(record: dict[str, Any]) -> Row:
    """A row of image, question and answer; closed if the answer is yes or no, as the Hub's copies
    of VQA-RAD and PathVQA say no more."""
    answer = text_of(record, "answer")
    closed = answer.lower() in ("yes", "no")
    return Row(
        question=text_of(record, "question"),
        answer=answer,
        images=[embedded_image(record.get("image"))],
        columns={"answer_type": "CLOSED" if closed else "OPEN"},
    )


VQA_RAD = Source(
    "VQA-RAD",
    _rows,
    columns=("id", "answer_type", "question_type", "organ", "phrase_type"),
    expected={"test": 451},
)
