"""Rejected samples by reason, with pictures of those that the shards hold."""

import base64
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.ledger import BadSample, Rejection
from megatron_gmai.data.plan.order import permutation
from megatron_gmai.data.shards.format import Shards, StoredSample

PICTURES = 4  # of each reason
SIDE = 96  # pixels
NUMBERS = re.compile(r"\d+")


@dataclass(frozen=True)
class Reason:
    """Rejections whose reasons differ in names and numbers only."""

    text: str  # `#` for each number
    rejections: list[Rejection]

    @property
    def sources(self) -> dict[str, int]:
        """Samples by data set, most first."""
        counts: dict[str, int] = {}
        for rejection in self.rejections:
            counts[rejection.source] = counts.get(rejection.source, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


def by_reason(rejections: Sequence[Rejection]) -> list[Reason]:
    """The most frequent first."""
    groups: dict[str, list[Rejection]] = {}
    for rejection in rejections:
        text = rejection.reason
        if text.startswith("image ") and ": " in text:  # image NAME: reason
            text = "image: " + text.partition(": ")[2]
        groups.setdefault(NUMBERS.sub("#", text), []).append(rejection)
    return sorted(
        (Reason(text, found) for text, found in groups.items()),
        key=lambda reason: -len(reason.rejections),
    )


def pictures(reason: Reason, shards: Shards) -> Iterator[tuple[str, str]]:
    """(key, JPEG as a data URL) of the first images of the reason's samples. Samples that were
    rejected before they came into the shards, or that cannot be read any more, have none."""
    found = 0
    for rejection in reason.rejections[: 10 * PICTURES]:
        stored = find_sample(shards, rejection)
        if stored is None or not stored.images:
            continue
        try:
            picture = _picture(stored.images[0])
        except BadSample:
            continue
        yield rejection.key, picture
        found += 1
        if found == PICTURES:
            return


def find_sample(shards: Shards, rejection: Rejection) -> StoredSample | None:
    """The sample of a ledger's key, `DATA_SET/NUMBER`; None if the shards do not hold it.

    Shards keep the records of a data set in a shuffled order that follows from their count, so the
    place of a number in that order is known, and halving finds it: a few annotations are read.
    """
    names = [source.name for source in shards.manifest.sources]
    number = rejection.key.rpartition("/")[2]
    if rejection.source not in names or not number.isdecimal():
        return None
    source = names.index(rejection.source)
    info = shards.manifest.sources[source]
    records = info.samples + info.rejected
    if int(number) >= records:
        return None
    place = np.argsort(permutation(records, 0, source))  # of each record
    rows = np.flatnonzero(shards.rows["source"] == source)
    low, high = 0, len(rows)
    try:
        while low < high:
            middle = (low + high) // 2
            if place[_number(shards, int(rows[middle]))] < place[int(number)]:
                low = middle + 1
            else:
                high = middle
        stored = shards.read(int(rows[low])) if low < len(rows) else None
    except (ValueError, IndexError):  # damaged, no longer there, or made by another tool
        return None
    return stored if stored is not None and stored.key == rejection.key else None


def _number(shards: Shards, row: int) -> int:
    return int(shards.read_record(row)[0].rpartition("/")[2])


def _picture(data: bytes) -> str:
    image = Image.fromarray(decode(data))
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
