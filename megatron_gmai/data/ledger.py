"""The ledger of samples that could not be used: one JSON line each, with key, source and reason."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class BadSample(ValueError):
    """A sample that cannot be used; the message is the reason that the ledger states."""


class Rejection(NamedTuple):
    """One line of the ledger."""

    key: str  # NAME/NUMBER: data set and record number, as in the shards
    source: str  # the data set's name in the list file
    reason: str


class Ledger:
    """Appends rejections to a JSON Lines file, each key once, also over several runs.

    With `path=None` rejections are counted and not written: only one rank writes.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._keys: set[str] = set()
        if self.path is not None and self.path.exists():
            self._keys = {line.key for line in read_ledger(self.path)}

    def __len__(self) -> int:
        """Distinct samples rejected so far."""
        return len(self._keys)

    def add(self, rejections: Iterable[Rejection]) -> None:
        """Records what is new among `rejections`."""
        new = []
        for rejection in rejections:
            if rejection.key not in self._keys:
                self._keys.add(rejection.key)
                new.append(rejection)
        if new and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(dump_line(rejection) for rejection in new))


def dump_line(rejection: Rejection) -> str:
    """The rejection as one line of JSON, in ASCII: a damaged text cannot spoil the ledger."""
    return json.dumps(rejection._asdict()) + "\n"


def read_ledger(path: str | os.PathLike[str]) -> list[Rejection]:
    """Reads a ledger; a last line cut off by a crash is left out. A missing file is empty."""
    if not Path(path).exists():
        return []
    lines = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            fields = json.loads(text)
        except ValueError:
            continue
        lines.append(Rejection(fields["key"], fields["source"], fields["reason"]))
    return lines
