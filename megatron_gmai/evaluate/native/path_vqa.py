"""PathVQA: the Hub's `flaviagiammarino/path-vqa` (image, question, answer), 6,719 test questions.

The authors' files are pickles, which are not read.
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_gmai.evaluate.native.convert import Attempt, Source, attempt
from megatron_gmai.evaluate.native.files import parquet_files, read_parquet
from megatron_gmai.evaluate.native.vqa_rad import from_hub


def _rows(folder: Path, split: str) -> Iterator[Attempt]:
    for number, record in enumerate(read_parquet(parquet_files(folder, split))):
        yield attempt(str(number), from_hub, record)


PATH_VQA = Source("PathVQA", _rows, columns=("answer_type",), expected={"test": 6719})
