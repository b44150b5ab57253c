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
from megatron_gmai.data.sources.parquet_pages import check_pages

SUFFIX = ".parquet"
# A page of some bytes may stand for a large value as often as it likes, so rows are unpacked one by
# one, and all together to no more than images that were compressed before can grow to.
LEAST_BOUND = 2**28  # bytes
MAX_PAGE = 2**29  # bytes unpacked; a page holds a value at least, and so an image
BUFFER = 2**22
MAX_GROWTH = 100  # real files reach about 20, where many questions share an image
_EMBEDDED = re.compile(r"@(\d{1,19})\+(\d{1,19})")  # first byte and size in the file of images


def unpack(file: Path, records: Path, images: Path, most: int) -> None:
    """Writes the rows of a Parquet file to `records`, and appends its images to `images`.

    An image of more than `most` bytes is left out; its name tells its size, for which it is refused
    when it is read. Raises ValueError like `parquet_rows`.
    """
    with images.open("ab") as blob, records.open("w", encoding="utf-8") as lines:
        for row in parquet_rows(file):
            value = row.pop("images", None)
            named = row.get("image") if value is None else value
            row["image"] = _names(named, blob, most)
            if isinstance(row.get("conversations"), str):
                row["conversations"] = _parsed(row["conversations"])
            # JSON has no bytes and no dates; no annotation needs them.
            lines.write(json.dumps(row, default=lambda other: None) + "\n")


def parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Raises ValueError if the file is damaged or unpacks to far more than it has, or without
    pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{file} needs pyarrow: pip install 'megatron-gmai[parquet]'") from error
    unpacked = 0
    try:
        most = most_unpacked(file)
        metadata = pyarrow.parquet.read_metadata(file)
        check_pages(file, metadata, min(most, MAX_PAGE))
        # Lists stay numbers of values until their size is known: one row can name a value a million
        # times. The buffer, so that a column of a row group, maybe the file, is not read at once.
        with pyarrow.parquet.ParquetFile(
            file, metadata=metadata, read_dictionary=_lists_of_bytes(metadata), buffer_size=BUFFER
        ) as table:
            for row in table.iter_batches(batch_size=1, use_threads=False):
                unpacked += sum(map(_full_size, row.columns))
                if unpacked > most:
                    raise ValueError(f"it unpacks to more than {most} bytes")
                yield from row.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"cannot read annotations {file}: {error}") from error


def _lists_of_bytes(metadata: Any) -> list[str]:
    """Columns of which a row may hold many values of any length."""
    columns = map(metadata.schema.column, range(metadata.num_columns))
    return [c.path for c in columns if c.max_repetition_level and c.physical_type == "BYTE_ARRAY"]


def _full_size(array: Any) -> int:
    """Bytes of an Arrow array, each value as often as it is named."""
    import pyarrow.compute

    kind = pyarrow.types
    if kind.is_list(array.type) or kind.is_large_list(array.type):
        return _full_size(array.flatten())
    if kind.is_map(array.type):
        return _full_size(array.keys) + _full_size(array.items)
    if kind.is_struct(array.type):
        return sum(map(_full_size, array.flatten()))
    if kind.is_dictionary(array.type):
        sizes = pyarrow.compute.binary_length(array.dictionary).take(array.indices)
        return array.indices.nbytes + (pyarrow.compute.sum(sizes).as_py() or 0)
    return int(array.nbytes)


def most_unpacked(file: Path) -> int:
    """Bytes that a packed file of annotations may grow to."""
    return max(LEAST_BOUND, MAX_GROWTH * file.stat().st_size)


def _names(value: Any, blob: BinaryIO, most: int) -> Any:
    """What the record says of its images: places in the file of images, or names as they are."""
    if isinstance(value, list):
        return [_names(item, blob, most) for item in value]
    if isinstance(value, dict):
        data = value.get("bytes")
        return value.get("path") if data is None else _names(data, blob, most)
    if isinstance(value, bytes):
        start = blob.tell()
        if len(value) <= most:
            blob.write(value)
        return f"@{start}+{len(value)}"
    return value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def embedded_size(name: str) -> int | None:
    """Bytes of an embedded image by its name, None if the name is not of that kind."""
    match = _EMBEDDED.fullmatch(name)
    return None if match is None else int(match[2])


def read_embedded(images: Path, name: str, most: int) -> bytes | None:
    """An embedded image by its name, None if the name is not of that kind. Raises BadSample."""
    match = _EMBEDDED.fullmatch(name)
    if match is None:
        return None
    start, size = map(int, match.groups())
    if size > most:
        raise BadSample(f"image {name}: larger than {most} bytes")
    with images.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) != size:
        raise BadSample(f"image {name}: outside of the embedded images")
    return data
