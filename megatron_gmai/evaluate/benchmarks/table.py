"""Benchmarks in VLMEvalKit's TSV, one question a row.

Columns: `index`, `image` (base64, the index of the row whose image is meant, or a Python list of
base64), `image_path`, `question`, `hint`, `A` ... `Z`, `answer`, `category`, `l2-category`,
`split`; any others are kept and can group scores. pandas would take cells such as "None" or "NA"
for missing; here only an empty cell is.
"""

import csv
import hashlib
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

from megatron_gmai.data.ledger import BadSample
from megatron_gmai.evaluate.benchmarks.cells import MAX_REFERENCE, read_file, split_cell, to_bytes

MAX_ROW_BYTES = 512 * 1024**2
_OWN_COLUMNS = {"index", "image", "image_path", "question", "hint", "answer", "prediction"}
_CIRCULAR = re.compile("mmbench|ccbench|circular|mmcr", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Item:
    """One question. Its images stay in the file; see `Benchmark.images`."""

    index: str
    question: str
    answer: str  # "" where the benchmark keeps its answers
    options: dict[str, str]  # letter -> text
    hint: str
    image_key: str  # the same for all questions about the same image or images
    columns: dict[str, str]  # all other columns that are not empty
    span: tuple[int, int]  # first byte and size of the row


@dataclass(frozen=True)
class Benchmark:
    """The questions of a TSV file, in its order."""

    name: str
    path: Path
    items: list[Item]
    without_image: int  # rows that were left out, as VLMEvalKit does

    @property
    def circular(self) -> bool:
        """Whether VLMEvalKit scores a set of this name circularly (all rotations or nothing)."""
        return bool(_CIRCULAR.search(self.name)) and not self.name.startswith("GMAI-MMBench")

    def images(self, item: Item) -> list[bytes]:
        """The image files of a question, undecoded. Raises BadSample for those that are damaged,
        missing, too large or outside of the benchmark's folder."""
        row = self._row(item)
        cells = split_cell(row["image"]) if row.get("image") else []
        if not cells:
            roots = (self.path.parent, self.path.parent / "images" / self.name)
            names = split_cell(row["image_path"])
            return [read_file(name, *roots) for name in names]
        if len(cells) == 1 and len(cells[0]) <= MAX_REFERENCE:
            cells = split_cell(self._row(self._referred(cells[0]))["image"])
            if not cells:
                raise BadSample("the row whose image is meant has none in its image cell")
        return [to_bytes(cell) for cell in cells]

    @cached_property
    def by_index(self) -> dict[str, Item]:
        return {item.index: item for item in self.items}

    def _referred(self, index: str) -> Item:
        if index not in self.by_index:
            raise BadSample(f"the image of row {index} is meant, which is not there")
        return self.by_index[index]

    def _row(self, item: Item) -> dict[str, str]:
        with self.path.open("rb") as file:
            header = next(_rows(_Lines(file)))
            file.seek(item.span[0])
            cells = next(_rows(_Lines(file)))
        return _named(_column_names(header), cells)


def read_benchmark(path: Path) -> Benchmark:
    """Reads the questions and where their images are. Raises ValueError for files that are none."""
    name = path.stem.removesuffix("_local")
    try:
        with path.open("rb") as file:
            rows = list(_numbered_rows(file, path))
    except OSError as error:
        raise ValueError(f"cannot read benchmark {path}: {error.strerror}") from error
    keys = {row["index"]: _image_key(row) for _, row in rows}
    if len(keys) != len(rows):
        raise ValueError(f"{path}: two rows have the same index; every row needs its own")
    items = [_item(row, span, keys) for span, row in rows if keys[row["index"]]]
    if not items:
        raise ValueError(f"{path} holds no question with an image")
    return Benchmark(name, path, items, len(rows) - len(items))


def _numbered_rows(file: BinaryIO, path: Path) -> Iterator[tuple[tuple[int, int], dict[str, str]]]:
    """Span and cells of each row; of images only what tells them apart."""
    lines = _Lines(file)
    try:
        rows = _rows(lines)
        columns = _column_names(next(rows, []))
        if not {"index", "question"} <= set(columns):
            raise ValueError(f"{path}: a benchmark needs the columns index and question")
        start = lines.position
        for cells in rows:
            _check_width(cells, columns, f"{path}, byte {start}")
            row = _named(columns, cells)
            if len(row.get("image", "")) > MAX_REFERENCE:
                row["image"] = f"sha256:{hashlib.sha256(row['image'].encode()).hexdigest()}"
            if cells:
                yield (start, lines.position - start), row
            start = lines.position
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}, byte {lines.position}: not a TSV file in UTF-8: {error}"
        ) from error


def _check_width(cells: Sequence[str], columns: Sequence[str], place: str) -> None:
    """Raises ValueError for a row in whose cells others or parts of others seem to lie. A row that
    only ends early is none: its last cells are empty."""
    swallowed = len(cells) != len(columns) and any("\n" in cell for cell in cells)
    if swallowed or any(cells[len(columns) :]):
        raise ValueError(
            f"{place}: a row has {len(cells)} cells, the header {len(columns)}; "
            "is a quote not closed, or a tab not in quotes?"
        )


def _image_key(row: dict[str, str]) -> str:
    return row.get("image") or row.get("image_path", "")


def _item(row: dict[str, str], span: tuple[int, int], keys: dict[str, str]) -> Item:
    key = keys[row["index"]]
    return Item(
        index=row["index"],
        question=row["question"],
        answer=row.get("answer", ""),
        options={c: row[c] for c in string.ascii_uppercase if row.get(c)},
        hint=row.get("hint", ""),
        image_key=keys.get(key) or key,
        columns={
            name: cell
            for name, cell in row.items()
            if cell and len(name) > 1 and name not in _OWN_COLUMNS
        },
        span=span,
    )


def _column_names(header: Sequence[str]) -> list[str]:
    """Lower case, as VLMEvalKit makes them, except the letters of options."""
    names = [name.strip().removeprefix("\ufeff") for name in header]
    return [name if len(name) == 1 and name.isupper() else name.lower() for name in names]


def _named(columns: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    """Cells by column; those that a short row lacks are empty."""
    return dict(zip_longest(columns, cells[: len(columns)], fillvalue=""))


class _Lines:
    """Text lines of a file, and how many bytes they took: csv reads no line ahead."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.position = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.file.readline(MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self.position += len(line)
        if len(line) > MAX_ROW_BYTES:
            raise csv.Error(f"a line of more than {MAX_ROW_BYTES} bytes")
        return line.decode("utf-8")


def _rows(lines: _Lines) -> Iterator[list[str]]:
    # The module's own limit, of the whole process, is far below the size of an image.
    csv.field_size_limit(MAX_ROW_BYTES)
    return csv.reader(lines, delimiter="\t")
