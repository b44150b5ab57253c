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
from megatron_gmai.data.shards.reader import Shards, StoredSample

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
    """The sample of a ledger's key `TAR@BYTE`, the place of a stored sample; None for other keys,
    those of records that never came into the shards, and where there is no such sample."""
    name, at, offset = rejection.key.rpartition("@")
    names = [shard.name for shard in shards.manifest.shards]
    if not at or name not in names or not offset.isdecimal():
        return None
    first = shards.first_rows[names.index(name)]
    rows = shards.rows[first : first + shards.manifest.shards[names.index(name)].samples]
    found = np.flatnonzero(rows["offset"] == int(offset))
    try:
        return shards.read(int(first + found[0])) if len(found) else None
    except (ValueError, IndexError):  # damaged, or no longer there
        return None


def _picture(data: bytes) -> str:
    image = Image.fromarray(decode(data))
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
