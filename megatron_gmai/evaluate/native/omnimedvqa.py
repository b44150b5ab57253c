"""OmniMedVQA: `QA_information/Open-access/*.json` (88,996 questions of 42 data sets) and `Images`.

The split is `Open-access` or `Restricted-access`. One published record says `modality` for
`modality_type`; both are read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_gmai.evaluate.benchmarks.write import Row
from megatron_gmai.evaluate.native.convert import Attempt, Source, attempt, letter_of
from megatron_gmai.evaluate.native.files import image_file, read_json_list, text_of


def _rows(folder: Path, split: str) -> Iterator[Attempt]:
    files = sorted((folder / "QA_information" / split).glob("*.json"))
    if not files:
        raise ValueError(f"{folder / 'QA_information' / split} holds no JSON file")
    for file in files:
        for record in read_json_list(file):
            yield attempt(text_of(record, "question_id"), _row, record, folder)


def _row(record: dict[str, Any], folder: Path) -> Row:
    options = [text for c in "ABCD" if (text := text_of(record, f"option_{c}"))]
    question_type = text_of(record, "question_type")
    return Row(
        question=text_of(record, "question"),
        answer=letter_of(text_of(record, "gt_answer"), options),
        images=[image_file(record.get("image_path"), folder)],
        options=options,
        columns={
            "id": text_of(record, "question_id"),
            "category": text_of(record, "dataset"),
            "question_type": question_type,
            "modality": text_of(record, "modality_type") or text_of(record, "modality"),
        },
    )


OMNIMEDVQA = Source(
    "OmniMedVQA",
    _rows,
    columns=("id", "category", "question_type", "modality"),
    options=4,
    split="Open-access",
    expected={"Open-access": 88996},
)
