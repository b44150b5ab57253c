"""PMC-VQA: four options each; `test_2.csv` with `figures` or `images_2`, or the first version's
`test.csv` or `test_clean.csv` with `images`.

The split is the name of the CSV file. Choices carry their letters ("A: text"), which are taken off.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_gmai.data.ledger import BadSample
from megatron_gmai.evaluate.benchmarks.write import Row
from megatron_gmai.evaluate.native.convert import Attempt, Source, attempt, letter_of
from megatron_gmai.evaluate.native.files import image_file, read_csv, text_of

_FOLDERS = ("figures", "images_2", "images")
_LETTERS = "abcd"


def _rows(folder: Path, split: str) -> Iterator[Attempt]:
    for number, record in enumerate(read_csv(folder / f"{split}.csv")):
        yield attempt(record.get("index") or str(number), _row, record, folder)


def _row(record: dict[str, str], folder: Path) -> Row:
    options = [_without_letter(text_of(record, f"choice {c}"), c) for c in _LETTERS]
    if not all(options):
        raise BadSample("a choice is empty")
    # The first version has the letter in a column of its own, the second in `answer`.
    truth = text_of(record, "answer_label") or text_of(record, "answer")
    answer = truth.upper() if truth.lower() in _LETTERS else letter_of(truth, options)
    folders = [folder / name for name in _FOLDERS if (folder / name).is_dir()]
    return Row(
        question=text_of(record, "question"),
        answer=answer,
        images=[image_file(text_of(record, "figure_path"), *(folders or [folder]))],
        options=options,
    )


def _without_letter(choice: str, letter: str) -> str:
    return re.sub(rf"^{letter}\s*[:.]\s*", "", choice, flags=re.IGNORECASE).strip()


PMC_VQA = Source("PMC-VQA", _rows, columns=(), options=4, split="test_2", expected={})
