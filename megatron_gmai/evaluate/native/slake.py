"""SLAKE: `test.json` (or `validate.json`) and the folder `imgs`, questions in English and Chinese.

Papers differ in which language they count; `language` is a column and scores are grouped by it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_gmai.evaluate.benchmarks.write import Row
from megatron_gmai.evaluate.native.convert import Attempt, Source, attempt
from megatron_gmai.evaluate.native.files import image_file, read_json_list, text_of


def _rows(folder: Path, split: str) -> Iterator[Attempt]:
    for record in read_json_list(folder / f"{split}.json"):
        yield attempt(text_of(record, "qid"), _row, record, folder)


def _row(record: dict[str, Any], folder: Path) -> Row:
    return Row(
        question=text_of(record, "question"),
        answer=text_of(record, "answer"),
        images=[image_file(record.get("img_name"), folder / "imgs")],
        columns={
            "id": text_of(record, "qid"),
            "language": text_of(record, "q_lang"),
            "answer_type": text_of(record, "answer_type"),
            "modality": text_of(record, "modality"),
            "organ": text_of(record, "location"),
            "content_type": text_of(record, "content_type"),
        },
    )


SLAKE = Source(
    "SLAKE",
    _rows,
    columns=("id", "language", "answer_type", "modality", "organ", "content_type"),
    expected={"test": 2094},
)
