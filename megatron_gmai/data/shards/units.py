"""The units of building: the records that go into one tar file, and what they were made from."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.plan.order import permutation
from megatron_gmai.data.pool import Report
from megatron_gmai.data.shards.check import Located, locate_images
from megatron_gmai.data.sources.mixture import Source
from megatron_gmai.data.sources.records import RecordReader, Records, parse_record

RECORDS_PER_SHARD = 1000
BYTES_PER_SHARD = 256 * 2**20
MAX_NAME = 60  # characters, with room in a tar header for what follows
HASHED = re.compile(r"-[0-9a-f]{12}$")  # as the end of a name that was replaced
PROBED = 8  # records of a block whose images tell how large they all are


@dataclass(frozen=True)
class Unit:
    """Records that go into one tar file."""

    source: Source
    shard: str
    numbers: np.ndarray  # int64 [records], within the data set
    spans: np.ndarray  # records.SPAN [records]
    size: int  # bytes, by a guess from few

    def key(self, number: int) -> str:
        """The key of a record, in shards and in the ledger."""
        return f"{slug(self.source.name)}/{number:08d}"

    def texts(self) -> Iterator[tuple[int, np.void, bytes]]:
        """Number, span and bytes of each record."""
        with RecordReader(self.source.annotation_files) as reader:
            for number, span in zip(self.numbers, self.spans, strict=True):
                yield int(number), span, reader.text(span)


def slug(name: str) -> str:
    """A data set's name as it may stand in file names and keys: another one for each name."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    if plain == name and 0 < len(name) <= MAX_NAME and not HASHED.search(name):
        return plain
    return f"{plain[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def cut_units(source: Source) -> list[Unit]:
    """Cuts a data set into shards. Records are shuffled once, so that each shard is a fair sample
    of its data set and a window of few shards is not biased. Large images make smaller shards."""
    records = Records(source.annotation_files)
    order = permutation(len(records), 0, _number(source.name))
    units = []
    for block, start in enumerate(range(0, len(records), RECORDS_PER_SHARD)):
        chosen = order[start : start + RECORDS_PER_SHARD]
        spans = records.spans[chosen]
        size = _probed_size(source, spans)
        parts = min(len(chosen), max(1, round(size / BYTES_PER_SHARD)))
        for part in range(parts):
            name = f"{slug(source.name)}-{block:05d}" + (f"-{part:03d}" if parts > 1 else "")
            own = slice(len(chosen) * part // parts, len(chosen) * (part + 1) // parts)
            unit = Unit(source, f"{name}.tar", chosen[own], spans[own], size // parts)
            units.append(unit)
    return units


def _number(name: str) -> int:
    """Of the name and not of its place in the list, so that others may come and go."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")


def _probed_size(source: Source, spans: np.ndarray) -> int:
    """Bytes of the records' images, from the first few of them."""
    probed = spans[:PROBED]
    with RecordReader(source.annotation_files) as reader:
        sizes = [locate_images(_parsed(reader.text(span)), source)[0] for span in probed]
    return sum(sizes) * len(spans) // max(len(probed), 1)


class Fingerprint:
    """Of what a unit is made from: its records' bytes and the state of their image files."""

    def __init__(self, unit: Unit) -> None:
        source = unit.source
        options = (source.name, source.tiff_pages, source.nifti_slices, source.version)
        self._source = source
        self._digest = hashlib.sha256(repr(options).encode())

    def add(self, text: bytes, record: Any) -> dict[str, Located]:
        """Takes in a record; returns its image files, since they were looked for."""
        _, states, located = locate_images(record, self._source)
        self._digest.update(b"\n".join([text, *(state.encode() for state in states)]))
        return located

    def value(self) -> str:
        return self._digest.hexdigest()[:16]


def unit_fingerprint(unit: Unit, report: Report) -> str:
    """What writing the unit would find, without reading an image."""
    fingerprint = Fingerprint(unit)
    for done, (_, _, text) in enumerate(unit.texts()):
        report(done, 0)
        fingerprint.add(text, _parsed(text))
    report(len(unit.numbers), 0)
    return fingerprint.value()


def _parsed(text: bytes) -> Any:
    try:
        return parse_record(text)
    except BadSample:
        return None
