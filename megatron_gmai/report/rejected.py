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
    """The sample of a ledger's key: `DATA_SET/NUMBER`, or `SHARD@OFFSET` if that was not readable.

    Within a data set our shards keep the order of the records, so that a search by halves reads a
    few annotations only.
    """
    names = [source.name for source in shards.manifest.sources]
    number = rejection.key.rpartition("/")[2]
    if rejection.source not in names or not number.isdecimal():
        return None
    rows = np.flatnonzero(shards.rows["source"] == names.index(rejection.source))
    low, high = 0, len(rows)
    try:
        while low < high:
            middle = (low + high) // 2
            if _number(shards, int(rows[middle])) < int(number):
                low = middle + 1
            else:
                high = middle
        stored = shards.read(int(rows[low])) if low < len(rows) else None
    except ValueError:  # a damaged sample, or shards that are no longer there
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
