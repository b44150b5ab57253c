"""Predictions in VLMEvalKit's files: the benchmark without its images, and a column `prediction`.

`MODEL_BENCHMARK.tsv`, `.json` (a list of objects) or `.xlsx`, which needs openpyxl.
"""

import csv
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from megatron_gmai.data.files import write_atomically
from megatron_gmai.evaluate.benchmarks.table import Benchmark

FORMATS = ("tsv", "json", "xlsx")
MAX_FILE_BYTES = 2 * 1024**3
MAX_UNPACKED_BYTES = 512 * 1024**2  # of a workbook, whose cells take four times that
_NOT_IN_XLSX = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # XML 1.0 has no such characters
_MAX_XLSX_CELL = 32_767


def read_predictions(path: Path) -> dict[str, str]:
    """Answers by index. Raises ValueError for files that hold none or an index twice."""
    readers = {".tsv": _read_tsv, ".json": _read_json, ".xlsx": _read_xlsx}
    if path.suffix not in readers:
        raise ValueError(f"predictions {path}: known are files of {', '.join(readers)}")
    answers: dict[str, str] = {}
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"predictions {path}: larger than {MAX_FILE_BYTES} bytes")
        for row in readers[path.suffix](path):
            index, answer = _answer(path, row)
            if index in answers:
                raise ValueError(f"predictions {path}: index {index} stands there twice")
            answers[index] = answer
    except OSError as error:
        raise ValueError(f"cannot read predictions {path}: {error.strerror}") from error
    return answers


def _answer(path: Path, row: Mapping[str, Any]) -> tuple[str, str]:
    if "index" not in row or "prediction" not in row:
        raise ValueError(f"predictions {path}: a row without index or prediction")
    index = str(row["index"])
    answer = "" if row["prediction"] is None else str(row["prediction"])
    try:  # half of a surrogate pair, which JSON can spell and no result file hold
        (index + answer).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"predictions {path}: index {index!r} is not valid Unicode") from error
    return index, answer


def write_predictions(path: Path, benchmark: Benchmark, answers: Mapping[str, str]) -> None:
    """Writes the rows that have an answer, in the benchmark's order, in the format of the name."""
    table = _table(benchmark, answers)
    if path.suffix == ".tsv":
        text = io.StringIO(newline="")
        csv.writer(text, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(
            table
        )
        data = text.getvalue().encode("utf-8")
    elif path.suffix == ".json":
        head, *rows = table
        records = [dict(zip(head, row, strict=True)) for row in rows]
        data = json.dumps(records, ensure_ascii=False, indent=4).encode("utf-8")
    elif path.suffix == ".xlsx":
        data = _xlsx(table)
    else:
        raise ValueError(f"predictions {path}: the name must end in one of {', '.join(FORMATS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)


def _table(benchmark: Benchmark, answers: Mapping[str, str]) -> list[list[Any]]:
    items = [item for item in benchmark.items if item.index in answers]
    letters = [c for c in ascii_uppercase if any(c in item.options for item in items)]
    extra = sorted({name for item in items for name in item.columns})
    whole = all(_is_number(item.index) for item in items)
    rows = [
        [
            int(item.index) if whole else item.index,
            item.question,
            item.hint,
            *(item.options.get(letter, "") for letter in letters),
            item.answer,
            *(item.columns.get(name, "") for name in extra),
            answers[item.index],
        ]
        for item in items
    ]
    return [["index", "question", "hint", *letters, "answer", *extra, "prediction"], *rows]


def _is_number(index: str) -> bool:
    """Whether an index comes back from a number as it was, also from the doubles of a workbook."""
    return index.isdecimal() and len(index) <= 15 and str(int(index)) == index


def _read_tsv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_FILE_BYTES)  # the module's own limit is for a whole process
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t")
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"predictions {path}: not a TSV file: {error}") from error


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"predictions {path}: not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"predictions {path}: must be a list of objects")
    return rows


def _read_xlsx(path: Path) -> Iterator[dict[str, Any]]:
    """One row at a time: a row's number says how many empty ones openpyxl puts before it."""
    openpyxl = _openpyxl()
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(file.file_size for file in archive.infolist())
        if unpacked > MAX_UNPACKED_BYTES:
            raise ValueError(f"{unpacked} bytes when unpacked, more than {MAX_UNPACKED_BYTES}")
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        rows = book.active.iter_rows(values_only=True)
        head = next(rows, ())
        for row in rows:
            yield dict(zip(head, row, strict=False))
    except Exception as error:  # it raises anything on damaged files
        raise ValueError(f"predictions {path}: not a workbook: {error}") from error


def _xlsx(table: Sequence[Sequence[Any]]) -> bytes:
    book = _openpyxl().Workbook(write_only=True)
    sheet = book.create_sheet()
    for row in table:
        sheet.append([_xlsx_cell(sheet, value) for value in row])
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()


def _xlsx_cell(sheet: Any, value: Any) -> Any:
    """Text as text: openpyxl would take a leading "=" for a formula."""
    if not isinstance(value, str):
        return value
    from openpyxl.cell import WriteOnlyCell

    text = _NOT_IN_XLSX.sub("", value)[:_MAX_XLSX_CELL]
    cell = WriteOnlyCell(sheet, text)
    cell.data_type = "s"
    return cell


def _openpyxl() -> Any:
    try:
        import openpyxl
    except ImportError as error:
        raise ValueError(
            "xlsx needs openpyxl: pip install 'megatron-gmai[evaluate]', or choose tsv or json"
        ) from error
    return openpyxl
