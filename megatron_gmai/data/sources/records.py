"""Annotation files: JSON lists and JSON Lines of any size, read a record at a time.

A file is scanned once for where its records begin and end; afterwards each is read on its own, in
any order and from any process, and no more than one is ever held in memory.
"""

import contextlib
import json
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.sources.encodings import check_encoding
from megatron_gmai.data.sources.json_text import Repeated, unique, without_trailing_commas

MAX_RECORD = 16 * 2**20  # bytes
CHUNK = 2**22
BOM = b"\xef\xbb\xbf"
WHITESPACE = " \t\r\n"
OBJECT = re.compile(rb"^\s*\{", re.MULTILINE)
WRAPPED = re.compile(rb'\s*\{\s*"(\w{1,80})"\s*:\s*\[\s*\{')  # {"data": [{...
# Where a record lies: number of the file, first byte, length; and its line in JSON Lines or its
# place in a list, from 1.
SPAN = np.dtype([("file", "<u4"), ("start", "<u8"), ("size", "<u4"), ("number", "<u4")])


class Records:
    """The records of several annotation files, one after another."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises ValueError if a file cannot be read or is neither a JSON list nor JSON Lines."""
        self.files = tuple(files)
        spans = [
            (n, start, min(size, MAX_RECORD + 1), number)  # a line may be longer than SPAN can tell
            for n, file in enumerate(self.files)
            for start, size, number in _scan(file)
        ]
        self.spans = np.array(spans, dtype=SPAN)

    def __len__(self) -> int:
        return len(self.spans)


class RecordReader:
    """Reads records by their spans; keeps the files open."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files, self._open = files, contextlib.ExitStack()
        self._handles: dict[int, int] = {}

    def __enter__(self) -> "RecordReader":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def text(self, span: np.void) -> bytes:
        """The bytes of one record; of one that is too long only so many that this shows."""
        number = int(span["file"])
        if number not in self._handles:
            handle = os.open(self._files[number], os.O_RDONLY)
            self._open.callback(os.close, handle)
            self._handles[number] = handle
        size = min(int(span["size"]), MAX_RECORD + 1)
        return os.pread(self._handles[number], size, int(span["start"]))


def read_record(file: Path, start: int, size: int) -> Any:
    """One record. Raises BadSample if its bytes are not one JSON value in UTF-8."""
    with file.open("rb") as stream:
        stream.seek(start)
        return parse_record(stream.read(min(size, MAX_RECORD + 1)))


def parse_record(text: bytes) -> Any:
    """The record of these bytes. A comma before a closing bracket is passed over. Raises BadSample
    if they are not one JSON value in UTF-8, or name a key twice."""
    if len(text) > MAX_RECORD:
        raise BadSample(f"a record of more than {MAX_RECORD} bytes")
    try:
        return json.loads(text, object_pairs_hook=unique)
    except Repeated as error:
        raise BadSample(str(error)) from error
    except (ValueError, RecursionError) as error:
        with contextlib.suppress(ValueError, RecursionError):
            mended, commas = without_trailing_commas(text.decode())
            if commas:
                return json.loads(mended, object_pairs_hook=unique)
        raise BadSample(f"not valid JSON: {error}") from error


def _scan(file: Path) -> Iterator[tuple[int, int, int]]:
    """First byte, length and number of each record."""
    try:
        with file.open("rb") as stream:
            if file.stat().st_size == 0:
                return
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                check_encoding(content[:CHUNK], file)
                start = len(BOM) if content[:3] == BOM else 0
                text = _Text(content, start, file)
                text.skip(WHITESPACE)
                if text.peek() == "[":
                    yield from _scan_list(text)
                else:
                    _check_lines(text)
                    yield from _scan_lines(content, start)
    except OSError as error:
        raise ValueError(f"cannot read annotations {file}: {error.strerror}") from error


def _scan_lines(content: mmap.mmap, start: int) -> Iterator[tuple[int, int, int]]:
    number = 0
    while start < len(content):
        number += 1
        stop = content.find(b"\n", start)
        stop = len(content) if stop < 0 else stop
        # A line may be huge: do not copy it to see whether it is blank.
        if stop - start > CHUNK or content[start:stop].strip():
            yield start, stop - start, number
        start = stop + 1


def _check_lines(text: "_Text") -> None:
    """Raises ValueError for objects that are spread over several lines, and for what is no JSON:
    each line would be taken for a broken record."""
    start = text.position
    beginning = text.content[start : start + MAX_RECORD]
    is_probed = len(beginning) < MAX_RECORD or b"\n" in beginning  # else one line, too long
    if beginning and is_probed and not OBJECT.search(beginning):
        raise ValueError(
            f"annotations {text.file} hold no JSON objects, they begin with {beginning[:40]!r}"
        )
    first_line = text.content.find(b"\n", start)
    wrapped = WRAPPED.match(beginning)
    if wrapped and wrapped[1] != b"conversations" and not beginning.count(b"\n", 0, -1):
        raise ValueError(
            f"annotations {text.file} are one object with a list under {wrapped[1].decode()!r}; "
            "the list alone is what is needed, or a record a line"
        )
    if text.peek() != "{" or first_line < 0 or first_line - start > CHUNK:
        return
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(text.content[start:first_line])
        return
    with contextlib.suppress(ValueError, RecursionError):
        text.value()
    if text.position > first_line:
        raise ValueError(
            f"annotations {text.file} hold JSON objects over several lines; put them into a list "
            "[...], or each on a line of its own"
        )


def _scan_list(text: "_Text") -> Iterator[tuple[int, int, int]]:
    """Elements of a JSON list, found by decoding them one at a time."""
    text.advance(1)
    text.skip(WHITESPACE)
    number = 0
    while text.peek() != "]":
        number += 1
        start = text.position
        try:
            text.value()
        except (ValueError, RecursionError) as error:
            raise text.error(error) from error
        yield start, text.position - start, number
        text.skip(WHITESPACE)
        mark = text.peek()
        if mark == ",":  # one before the closing bracket is passed over, as in list files
            text.advance(1)
            text.skip(WHITESPACE)
        elif mark != "]":
            raise text.error("expected , or ]")
    text.advance(1)
    text.skip(WHITESPACE)
    if text.peek():
        raise text.error("text after the list's closing ]")


class _Text:
    """A view of a file that moves forward in chunks.

    Bytes are decoded as Latin-1: one character a byte, so places in the text are places in the
    file. UTF-8's other bytes can stand only inside strings, whose contents do not matter here.
    """

    def __init__(self, content: mmap.mmap, start: int, file: Path) -> None:
        self.content, self.first, self.at, self.file = content, start, 0, file
        self.text = ""
        # Numbers are not needed here, and one that is too long is the matter of its record.
        self.decoder = json.JSONDecoder(strict=False, parse_int=len)
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

    def error(self, reason: Exception | str) -> ValueError:
        """The error with its line, column and byte in the file."""
        byte = self.position
        if isinstance(reason, json.JSONDecodeError):
            byte, reason = self.first + reason.pos, reason.msg
        line = self.content[:byte].count(b"\n") + 1
        column = byte - self.content.rfind(b"\n", 0, byte)
        return ValueError(
            f"annotations {self.file} are not valid JSON: {reason}: line {line} column {column} "
            f"(byte {byte})"
        )

    def value(self) -> None:
        """Moves behind the next JSON value. Raises ValueError if there is none."""
        size, mended = CHUNK, False
        while True:
            try:
                _, stop = self.decoder.raw_decode(self.text, self.at)
                # A number that ends with the chunk may go on in the next.
                if stop < len(self.text) or self.first + stop >= len(self.content):
                    self.at = stop
                    return
            except ValueError:
                whole = self.first + len(self.text) >= len(self.content) or size > MAX_RECORD
                if whole and mended:
                    raise
                if whole or not mended:
                    mended = True
                    if self._mend():
                        continue
                if whole:
                    raise
            size *= 2
            self._load(size)
            mended = False

    def _mend(self) -> bool:
        """Blanks out commas before closing brackets, which keeps all places as they are."""
        text, commas = without_trailing_commas(self.text[self.at :], " ")
        self.text = self.text[: self.at] + text
        return commas > 0
