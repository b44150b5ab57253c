"""Annotation files: JSON lists and JSON Lines of any size, read a record at a time.

A file is scanned once for where its records begin and end; afterwards each is read on its own, in
any order and from any process, and no more than one is ever held in memory.
"""

import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gmai.data.ledger import BadSample

MAX_RECORD = 16 * 2**20  # bytes
CHUNK = 2**22
BOM = b"\xef\xbb\xbf"
WHITESPACE = " \t\r\n"
# Where a record lies: number of the file, first byte, length.
SPAN = np.dtype([("file", "<u4"), ("start", "<u8"), ("size", "<u4")])


class Records:
    """The records of several annotation files, one after another."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises ValueError if a file cannot be read or is neither a JSON list nor JSON Lines."""
        self.files = tuple(files)
        spans = [(n, *span) for n, file in enumerate(self.files) for span in _scan(file)]
        self.spans = np.array(spans, dtype=SPAN)

    def __len__(self) -> int:
        return len(self.spans)


def read_record(file: Path, start: int, size: int) -> Any:
    """One record. Raises BadSample if its bytes are not one JSON value in UTF-8."""
    if size > MAX_RECORD:
        raise BadSample(f"a record of {size} bytes, more than {MAX_RECORD}")
    with file.open("rb") as stream:
        stream.seek(start)
        text = stream.read(size)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"not valid JSON: {error}") from error


def _scan(file: Path) -> Iterator[tuple[int, int]]:
    """First byte and length of each record."""
    try:
        with file.open("rb") as stream:
            if file.stat().st_size == 0:
                return
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                start = len(BOM) if content[:3] == BOM else 0
                text = _Text(content, start)
                text.skip(WHITESPACE)
                if text.peek() == "[":
                    yield from _scan_list(text, file)
                else:
                    yield from _scan_lines(content, start)
    except OSError as error:
        raise ValueError(f"cannot read annotations {file}: {error.strerror}") from error


def _scan_lines(content: mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    while start < len(content):
        stop = content.find(b"\n", start)
        stop = len(content) if stop < 0 else stop
        # A line may be huge: do not copy it to see whether it is blank.
        if stop - start > CHUNK or content[start:stop].strip():
            yield start, stop - start
        start = stop + 1


def _scan_list(text: "_Text", file: Path) -> Iterator[tuple[int, int]]:
    """Elements of a JSON list, found by decoding them one at a time."""
    text.advance(1)
    text.skip(WHITESPACE)
    if text.peek() == "]":
        return
    while True:
        start = text.position
        try:
            text.value()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"annotations {file} are not valid JSON: {error}") from error
        yield start, text.position - start
        text.skip(WHITESPACE)
        mark = text.peek()
        text.advance(1)
        text.skip(WHITESPACE)
        if mark == "]":
            return
        if mark != ",":
            raise ValueError(
                f"annotations {file} are not valid JSON: expected , or ] at byte {text.position}"
            )


class _Text:
    """A view of a file that moves forward in chunks.

    Bytes are decoded as Latin-1: one character a byte, so places in the text are places in the
    file. UTF-8's other bytes can stand only inside strings, whose contents do not matter here.
    """

    def __init__(self, content: mmap.mmap, start: int) -> None:
        self.content, self.first, self.at = content, start, 0
        self.text = ""
        self.decoder = json.JSONDecoder(strict=False)
        self._load(CHUNK)

    @property
    def position(self) -> int:
        return self.first + self.at

    def _load(self, size: int) -> None:
        self.first, self.at = self.position, 0
        self.text = self.content[self.first : self.first + size].decode("latin-1")

    def peek(self) -> str:
        """The next character; an empty string at the end."""
        if self.at >= len(self.text):
            self._load(CHUNK)
        return self.text[self.at : self.at + 1]

    def advance(self, count: int) -> None:
        self.at += count

    def skip(self, characters: str) -> None:
        while (character := self.peek()) and character in characters:
            self.at += 1

    def value(self) -> None:
        """Moves behind the next JSON value. Raises ValueError if there is none."""
        size = CHUNK
        while True:
            try:
                _, stop = self.decoder.raw_decode(self.text, self.at)
                # A number that ends with the chunk may go on in the next.
                if stop < len(self.text) or self.first + stop >= len(self.content):
                    self.at = stop
                    return
            except ValueError:
                if self.first + len(self.text) >= len(self.content) or size > MAX_RECORD:
                    raise
            size *= 2
            self._load(size)
