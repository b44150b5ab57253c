"""The ledger of samples that could not be used: one JSON line each, with place and reason."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from megatron_gmai.data.files import Lines
from megatron_gmai.data.schema import from_json

# Controls but the tab, ends of lines, overrides of the direction, halves of surrogate pairs.
_STEERING = re.compile(
    "[\0-\x08\n-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class BadSample(ValueError):
    """A sample that cannot be used; the message is the reason that the ledger states. `image` is
    the name of the image that is at fault, if one is."""

    def __init__(self, reason: str, image: str = "") -> None:
        super().__init__(reason)
        self.image = image


class Rejection(NamedTuple):
    """One line of the ledger. The key is unique: NAME/NUMBER for the record of a data set, else
    the tar file and the first byte of the sample. Fields that say nothing are left out."""

    key: str
    source: str  # the data set's name in the list file
    reason: str
    list_file: str = ""
    file: str = ""  # annotation file
    record: int = 0  # its line in JSON Lines, its place in a JSON list, from 1
    id: str = ""  # what the record, or the sample in its tar file, calls itself
    image: str = ""  # the image at fault


class Ledger:
    """Appends rejections to a JSON Lines file, each key once, also over several runs.

    With `path=None` rejections are counted and not written: only one rank writes.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._lines = None if self.path is None else Lines(self.path)
        self._keys: set[str] = set()
        if self.path is not None and self.path.exists():
            self._keys = {line.key for line in read_ledger(self.path)}
            with self.path.open("r+b") as file:  # a crash may have cut the last line off
                file.truncate(file.read().rfind(b"\n") + 1)

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
        if new and self._lines is not None:
            self._lines.path.parent.mkdir(parents=True, exist_ok=True)
            self._lines.add(dump_line(rejection) for rejection in new)


def dump_line(rejection: Rejection) -> str:
    """The rejection as one line of JSON, in ASCII: a damaged text cannot spoil the ledger."""
    return json.dumps(as_fields(rejection)) + "\n"


def as_fields(rejection: Rejection) -> dict[str, str | int]:
    """What the rejection says, for JSON."""
    said = {name: value for name, value in rejection._asdict().items() if value}
    return {name: encodable(value) if name != "record" else value for name, value in said.items()}


def encodable(text: str) -> str:
    """Halves of surrogate pairs, which JSON can spell and names of files stand for bytes with, as
    their escapes: no encoding takes them."""
    return text.encode("utf-8", "backslashreplace").decode()


def visible(text: str) -> str:
    """A stranger's text as one line to look at: what would steer a terminal, turn the direction of
    writing or end the line is shown as its escape."""
    return _STEERING.sub(lambda match: ascii(match[0])[1:-1], text)


def read_ledger(path: str | os.PathLike[str]) -> list[Rejection]:
    """Reads a ledger; a last line cut off by a crash is left out. A missing file is empty.

    Raises ValueError with the line that is none, and for a pipe or a folder.
    """
    if not Path(path).exists():
        return []
    if not Path(path).is_file():  # a pipe would wait for ever
        raise ValueError(f"{path} is no file; delete it")
    *lines, rest = Path(path).read_bytes().split(b"\n")
    ledger = []
    for number, text in enumerate(lines, 1):
        try:
            ledger.append(parse_line(json.loads(text)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged in line {number}: {error}; delete it") from error
    return ledger


def parse_line(fields: Any) -> Rejection:
    """A rejection from JSON. Raises ValueError if its fields are not those of one."""
    return from_json(Rejection, fields)
