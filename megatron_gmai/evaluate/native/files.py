"""Reads the files that benchmarks are published in: JSON, CSV, Parquet, folders of images.

They come from strangers: sizes are bounded, images stay in their folder, nothing is unpickled.
"""

import ast
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.sources.parquet import parquet_rows
from megatron_gmai.evaluate.benchmarks.cells import MAX_IMAGE_BYTES, read_file

MAX_JSON_BYTES = 2 * 1024**3
MAX_TEXT = 1_000_000


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """A JSON list of objects. Raises ValueError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: must be a list of objects, not {_kind(records)}")
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}: element {index} (counted from 0) is {_kind(record)}, not an object"
            )
    return records


def _kind(value: Any) -> str:
    names = {str: "a text", bool: "true or false", int: "a number", float: "a number"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    return names[type(value)]


def read_csv(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV file with a header, names in lower case. Raises ValueError."""
    csv.field_size_limit(MAX_TEXT)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            names = [name.strip().lower() for name in next(rows, [])]
            for row in rows:
                yield dict(zip(names, row, strict=False))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file: {error}") from error


def read_parquet(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Rows of Parquet files as the Hugging Face Hub stores data sets. Raises ValueError."""
    for path in files:
        yield from parquet_rows(path)


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The files of a split, `SPLIT-00000-of-00001-….parquet` in the folder or below `data`."""
    found = sorted(folder.glob(f"{split}-*.parquet")) or sorted(
        folder.glob(f"data/{split}-*.parquet")
    )
    if not found:
        raise ValueError(f"{folder} holds no {split}-*.parquet, neither itself nor in data/")
    return found


def embedded_image(cell: Any) -> bytes:
    """The bytes of the Hub's image structure `{"bytes", "path"}`. Raises BadSample."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes) or not data:
        raise BadSample("no embedded image")
    if len(data) > MAX_IMAGE_BYTES:
        raise BadSample(f"an image of more than {MAX_IMAGE_BYTES} bytes")
    return data


def image_file(name: Any, *folders: Path) -> bytes:
    """The image of this name in one of the folders. Raises BadSample."""
    if not isinstance(name, str) or not name:
        raise BadSample("no image is named")
    return read_file(name, *folders)


def text_of(record: dict[str, Any], key: str) -> str:
    """A text or a number as text, without spaces around it; "" if there is none."""
    value = record.get(key)
    return "" if value is None else str(value).strip()


def texts_of(literal: Any) -> list[str]:
    """The entries of a list, or of its literal as MMMU stores options. Raises BadSample."""
    value = literal
    if isinstance(literal, str):
        try:
            value = ast.literal_eval(literal) if len(literal) < MAX_TEXT else None
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            value = None
    if not isinstance(value, list | tuple):
        raise BadSample("the options are not a list")
    return [str(entry) for entry in value]
