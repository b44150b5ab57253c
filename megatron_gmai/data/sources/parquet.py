"""Parquet annotations with embedded images, as public hubs hold them (extra `parquet`).

A Parquet file is read in order only, so it is copied once into a JSON Lines file of records and a
file of all images' bytes, which are then read at random like any others. Columns are those of an
annotation record; `image` or `images` may hold bytes, hub structures `{"bytes", "path"}`, lists of
either, or names of files.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_gmai.data.ledger import BadSample

SUFFIX = ".parquet"
ROWS_AT_A_TIME = 64
_EMBEDDED = re.compile(r"@(\d{1,19})\+(\d{1,19})")  # first byte and size in the file of images


def unpack(file: Path, records: Path, images: Path) -> None:
    """Writes the rows of a Parquet file to `records`, and appends its images to `images`.

    Raises ValueError if the file is damaged, or without pyarrow.
    """
    with images.open("ab") as blob, records.open("w", encoding="utf-8") as lines:
        for row in _rows(file):
            value = row.pop("images", None)
            named = row.get("image") if value is None else value
            row["image"] = _names(named, blob)
            if isinstance(row.get("conversations"), str):
                row["conversations"] = _parsed(row["conversations"])
            # JSON has no bytes and no dates; no annotation needs them.
            lines.write(json.dumps(row, default=lambda other: None) + "\n")


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{file} needs pyarrow: pip install 'megatron-gmai[parquet]'") from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(ROWS_AT_A_TIME):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"cannot read annotations {file}: {error}") from error


def _names(value: Any, blob: BinaryIO) -> Any:
    """What the record says of its images: places in the file of images, or names as they are."""
    if isinstance(value, list):
        return [_names(item, blob) for item in value]
    if isinstance(value, dict):
        return value.get("path") if value.get("bytes") is None else _names(value["bytes"], blob)
    if isinstance(value, bytes):
        place = blob.tell()
        blob.write(value)
        return f"@{place}+{len(value)}"
    return value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def embedded_size(name: str) -> int | None:
    """Bytes of an embedded image by its name, None if the name is not of that kind."""
    place = _EMBEDDED.fullmatch(name)
    return None if place is None else int(place[2])


def read_embedded(images: Path, name: str, most: int) -> bytes | None:
    """An embedded image by its name, None if the name is not of that kind. Raises BadSample."""
    place = _EMBEDDED.fullmatch(name)
    if place is None:
        return None
    start, size = map(int, place.groups())
    if size > most:
        raise BadSample(f"image {name}: larger than {most} bytes")
    with images.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) != size:
        raise BadSample(f"image {name}: outside of the embedded images")
    return data
