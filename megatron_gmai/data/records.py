"""Annotation files: JSON lists and JSON Lines, one record after another."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_records(file: Path) -> Iterator[Any]:
    """Yields the records of one annotation file.

    A line of JSON Lines that is not valid JSON is yielded as a `ValueError`, so that the caller
    counts it and goes on. Raises ValueError if the file as a whole cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read annotations {file}: {error}") from error
    if text.lstrip().startswith("["):
        try:
            yield from json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"annotations {file} are not valid JSON: {error}") from error
        return
    for line in text.splitlines():
        if line.strip():
            yield _parse_line(line)


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON: {error}")
