"""MMMU, Health & Medicine: the Hub's `MMMU/MMMU`, a folder for each subject.

Five subjects of 30 validation questions: options are a list literal, images are `image_1` to
`image_7` and are meant by `<image 1>` and so on in question and options.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_gmai.data.ledger import BadSample
from megatron_gmai.evaluate.benchmarks.write import Row
from megatron_gmai.evaluate.native.convert import Attempt, Source, attempt
from megatron_gmai.evaluate.native.files import (
    embedded_image,
    parquet_files,
    read_parquet,
    text_of,
    texts_of,
)

SUBJECTS = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)
_MOST_IMAGES = 7
_TAG = re.compile(r"<image (\d)>")


def _rows(folder: Path, split: str) -> Iterator[Attempt]:
    for subject in SUBJECTS:
        for record in read_parquet(parquet_files(folder / subject, split)):
            key = text_of(record, "id")
            yield attempt(key, _row, record, subject, split)


def _row(record: dict[str, Any], subject: str, split: str) -> Row:
    options = texts_of(record.get("options") or "[]")
    numbers = [n for n in range(1, _MOST_IMAGES + 1) if record.get(f"image_{n}")]
    question = text_of(record, "question")
    named = {int(n) for n in _TAG.findall(" ".join([question, *options]))}
    if not named <= set(numbers):
        raise BadSample(f"<image {min(named - set(numbers))}> is not there")
    return Row(
        question=question,
        answer=text_of(record, "answer"),
        images=[embedded_image(record[f"image_{n}"]) for n in numbers],
        options=options,
        columns={
            "id": text_of(record, "id"),
            "category": subject,
            "l2-category": "Health & Medicine",
            "split": split,
            "question_type": text_of(record, "question_type"),
            "modality": text_of(record, "img_type"),
        },
    )


MMMU = Source(
    "MMMU_Health_Medicine",
    _rows,
    columns=("id", "category", "l2-category", "split", "question_type", "modality"),
    options=9,
    split="validation",
    expected={"validation": 150},
)
