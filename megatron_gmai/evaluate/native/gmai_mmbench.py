"""GMAI-MMBench: TSV files already, `GMAI-MMBench_VAL.tsv` or the parts of the test set.

The split is the start of their names. Parts are joined in the order of their numbers; questions of
the test have no answers, their predictions go to the authors.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase

from megatron_gmai.evaluate.benchmarks.table import Benchmark, Item, read_benchmark
from megatron_gmai.evaluate.benchmarks.write import Row
from megatron_gmai.evaluate.native.convert import Attempt, Source, attempt

_GROUPS = ("clinical vqa task", "department", "perceptual granularity")
COLUMNS = ("id", "category", "l2-category", "split", "modality", *_GROUPS)


def _rows(folder: Path, split: str) -> Iterator[Attempt]:
    files = sorted(folder.glob(f"{split}*.tsv"), key=_part)
    if not files:
        raise ValueError(f"{folder} holds no {split}*.tsv")
    for file in files:
        benchmark = read_benchmark(file)
        for item in benchmark.items:
            yield attempt(item.index, _row, item, benchmark)


def _part(path: Path) -> tuple[int, str]:
    number = re.search(r"part_(\d+)", path.name)
    return (int(number[1]) if number else 0, path.name)


def _row(item: Item, benchmark: Benchmark) -> Row:
    letters = ascii_uppercase[: max(map(ascii_uppercase.index, item.options), default=-1) + 1]
    columns = {name: item.columns[name] for name in COLUMNS if name in item.columns}
    return Row(
        question=item.question,
        answer=item.answer,
        images=benchmark.images(item),
        options=[item.options.get(letter, "") for letter in letters],
        hint=item.hint,
        columns={**columns, "id": item.index},
    )


GMAI_MMBENCH = Source(
    "GMAI-MMBench",
    _rows,
    columns=COLUMNS,
    options=8,
    split="GMAI-MMBench_VAL",
    expected={},
)
