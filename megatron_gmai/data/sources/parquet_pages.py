"""How large the pages of a Parquet file are, told before one is unpacked.

pyarrow unpacks a page whole, into as much memory as its header asks for; one of some bytes may
ask for gigabytes. It gives no headers out, so they are read here: `PageHeader` of the format's
parquet.thrift, in Thrift's compact protocol.
"""

import mmap
from pathlib import Path
from typing import Any

MAX_REPEATED = 2**24  # values of a list column in a row group: one row may hold them all
MAX_HEADER = 2**24  # bytes, as in Arrow
MAX_DEPTH = 16
# Fields of PageHeader; the last two are structures whose field 1 counts values.
UNPACKED, PACKED, DATA_PAGE, DATA_PAGE_2 = 2, 3, 5, 8
# Types of the compact protocol; 0 ends a structure.
TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
INTEGERS = (4, 5, 6)


def check_pages(file: Path, metadata: Any, most: int) -> None:
    """Raises ValueError for a page of more than `most` bytes, and for list columns of more values
    than fit in memory. `metadata` is pyarrow's FileMetaData."""
    if not metadata.num_rows:
        return
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            for column in range(metadata.num_columns):
                chunk = group.column(column)
                is_list = metadata.schema.column(column).max_repetition_level > 0
                if is_list and chunk.num_values > MAX_REPEATED:
                    raise ValueError(
                        f"{chunk.path_in_schema} has {chunk.num_values} values a group"
                    )
                _check_chunk(data, chunk, most)


def _check_chunk(data: mmap.mmap, chunk: Any, most: int) -> None:
    """Goes from page to page as Arrow does: until all values have been seen."""
    at, seen = chunk.data_page_offset, 0
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < at:
        at = chunk.dictionary_page_offset
    while seen < chunk.num_values:
        header = _Header(data, at)
        fields = header.structure()
        sizes = (fields.get(UNPACKED), fields.get(PACKED))
        if not all(isinstance(size, int) and 0 <= size <= most for size in sizes):
            raise ValueError(
                f"a page of {chunk.path_in_schema} of {sizes[0]} bytes, at most {most}"
            )
        counts = [fields.get(kind) for kind in (DATA_PAGE, DATA_PAGE_2)]
        seen += sum(max(0, count.get(1, 0)) for count in counts if isinstance(count, dict))
        at = header.at + fields[PACKED]


class _Header:
    """Reads a structure of the compact protocol; `at` is the byte that comes next."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self._data, self.at, self._end = data, at, min(len(data), at + MAX_HEADER)

    def structure(self, depth: int = 0) -> dict[int, Any]:
        """Fields by number; only numbers and structures have values."""
        if depth > MAX_DEPTH:
            raise ValueError("a page header without end")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            number = number + step if step else self._integer()
            # The type of a field that is true or false is its value.
            fields[number] = None if kind in (TRUE, FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in INTEGERS:
            return self._integer()
        if kind == STRUCT:
            return self.structure(depth + 1)
        if kind in (LIST, SET):
            self._list(depth)
        elif kind == MAP:
            self._map(depth)
        elif kind in (TRUE, FALSE, BYTE, DOUBLE):
            self._skip(8 if kind == DOUBLE else 1)
        elif kind == BINARY:
            self._skip(self._varint())
        else:
            raise ValueError("a damaged page header")
        return None

    def _list(self, depth: int) -> None:
        head = self._byte()
        for _ in range(self._varint() if head >> 4 == 15 else head >> 4):
            self._value(head & 15, depth + 1)

    def _map(self, depth: int) -> None:
        count = self._varint()
        kinds = self._byte() if count else 0
        for _ in range(count):
            self._value(kinds >> 4, depth + 1)
            self._value(kinds & 15, depth + 1)

    def _integer(self) -> int:
        coded = self._varint()  # zigzag
        return coded >> 1 ^ -(coded & 1)

    def _varint(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a damaged page header")

    def _byte(self) -> int:
        self._skip(1)
        return self._data[self.at - 1]

    def _skip(self, count: int) -> None:
        self.at += count
        if not 0 < self.at <= self._end:
            raise ValueError("a damaged page header")
