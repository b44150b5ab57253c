"""Writes a benchmark's TSV from its native files; what cannot be used is counted and named."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.ledger import BadSample, Rejection
from megatron_gmai.evaluate.benchmarks.write import Row, TableWriter

Attempt = tuple[str, Row | BadSample]  # key of a record, and its row or why there is none


@dataclass(frozen=True)
class Source:
    """How a benchmark is published. `rows` takes its folder and a split."""

    name: str
    rows: Callable[[Path, str], Iterator[Attempt]]
    columns: Sequence[str]
    options: int = 0
    split: str = "test"
    expected: Mapping[str, int] = field(default_factory=dict)  # questions of a split, if known


@dataclass(frozen=True)
class Converted:
    """What was written, what was not, and what another reader will see differently."""

    written: int
    expected: int | None
    seen_as_missing: int
    rejections: list[Rejection]


def attempt(key: str, make: Callable[..., Row], *arguments: Any) -> Attempt:
    """Makes a row; a record that cannot be one is a reason, not an end."""
    try:
        return key, make(*arguments)
    except BadSample as error:
        return key, error


def letter_of(truth: str, options: Sequence[str]) -> str:
    """The letter of the first option that is the truth. Raises BadSample if none is."""
    if truth not in options:
        raise BadSample(f"the answer {truth!r} is none of the options {list(options)}")
    return chr(ord("A") + options.index(truth))


def convert(
    source: Source, folder: Path, split: str, path: Path, language: str | None
) -> Converted:
    """Writes the split to `path`. With `language` only questions of that language.

    Raises ValueError if the native files are not there or none of their records can be used.
    """
    rejections = []
    with TableWriter(path, source.columns, source.options) as table:
        for key, row in source.rows(folder, split):
            try:
                if isinstance(row, BadSample):
                    raise row
                if language is None or row.columns.get("language") == language:
                    _check(row)
                    table.add(row)
            except BadSample as error:
                rejections.append(Rejection(f"{source.name}/{key}", source.name, str(error)))
        if not table.count:
            first = f": {rejections[0].reason}" if rejections else ""
            raise ValueError(f"no question of {folder} can be used{first}")
    expected = source.expected.get(split) if language is None else None
    return Converted(table.count, expected, table.seen_as_missing, rejections)


def _check(row: Row) -> None:
    """Raises BadSample for a row that could not be asked."""
    if not row.question:
        raise BadSample("no question")
    if not row.images:
        raise BadSample("no image")
    texts = [row.question, row.answer, row.hint, *row.options, *row.columns.values()]
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSample(f"not valid Unicode: {error.reason}") from error
    for data in row.images:
        decode(data)
