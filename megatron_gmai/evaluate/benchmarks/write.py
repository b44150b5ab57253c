"""Writes benchmarks in VLMEvalKit's TSV, row by row."""

import csv
import hashlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from types import TracebackType

from megatron_gmai.evaluate.benchmarks.cells import MAX_REFERENCE, to_cell

# Cells that pandas takes for missing when it reads a table (`pandas.read_csv`, `na_values`).
PANDAS_MISSING = frozenset(
    {"#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"}
    | {"<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
)


@dataclass(frozen=True)
class Row:
    """One question of a benchmark's own files. `answer` is a letter where there are options."""

    question: str
    answer: str
    images: list[bytes]
    options: Sequence[str] = ()
    hint: str = ""
    columns: dict[str, str] = field(default_factory=dict)


class TableWriter:
    """Writes a table under a partial name; the file gets its own when the block ends well.

    An image that came before is stored as the index of its first row.
    """

    def __init__(self, path: Path, columns: Iterable[str], options: int) -> None:
        """`columns` are the extra ones; `options` is the largest number of options of a row."""
        self.path = path
        self.letters = ascii_uppercase[:options]
        self.extra = list(columns)
        self.count = 0
        self.seen_as_missing = 0  # options and answers that pandas will not see
        self._partial = path.with_name(path.name + ".partial")
        self._first_rows: dict[bytes, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "TableWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self._stack.enter_context(self._partial.open("w", encoding="utf-8", newline=""))
        self._csv = csv.writer(file, delimiter="\t", lineterminator="\n")
        names = ["index", "image", "question", "hint", *self.letters, "answer", *self.extra]
        self._csv.writerow(names)
        return self

    def add(self, row: Row) -> None:
        """Appends a question; its index is its place."""
        if len(row.options) > len(self.letters):
            raise ValueError(f"{len(row.options)} options: {row.question!r}")
        options = [*row.options, *[""] * (len(self.letters) - len(row.options))]
        self.seen_as_missing += sum(c in PANDAS_MISSING for c in (*row.options, row.answer))
        extra = [row.columns.get(name, "") for name in self.extra]
        image = self._image_cell(row.images)
        self._csv.writerow(
            [self.count, image, row.question, row.hint, *options, row.answer, *extra]
        )
        self.count += 1

    def _image_cell(self, images: list[bytes]) -> str:
        cell = to_cell(images)
        digest = hashlib.sha256(cell.encode()).digest()
        first = self._first_rows.setdefault(digest, str(self.count))
        return cell if first == str(self.count) or len(cell) <= MAX_REFERENCE else first

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        if kind is None:
            self._partial.replace(self.path)
        else:
            self._partial.unlink(missing_ok=True)
