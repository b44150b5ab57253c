"""Compares a benchmark's images with those of the training shards, and names what matches."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.evaluate.benchmarks.table import Benchmark, Item
from megatron_gmai.evaluate.leakage.compare import Finder, Near
from megatron_gmai.evaluate.leakage.hashes import (
    UNREADABLE,
    check_installed,
    hash_image,
    hashes_of_shards,
)

# Bits of 256. On real images of seven kinds, 90 % of copies as JPEG of quality 60, and all of those
# that were scaled or made brighter, differ in at most 15; the most alike of different ones in 64.
DISTANCE = 15


@dataclass(frozen=True)
class Leaks:
    """What was found. `matches` is one entry for each evaluation image that has a match."""

    benchmark: str
    shards: str
    distance: int
    images: int
    unreadable_images: int
    training_images: int
    unreadable_training_samples: int
    matches: list[dict[str, Any]]

    @property
    def indices(self) -> set[str]:
        """Questions about an image that is in the training."""
        return {index for match in self.matches for index in match["indices"]}

    def to_text(self) -> str:
        exact = sum(match["exact"] for match in self.matches)
        lines = [
            f"{len(self.matches)} of {self.images} images of {self.benchmark} are among "
            f"{self.training_images} training images: {exact} with equal pixels, "
            f"{len(self.matches) - exact} that differ in at most {self.distance} of 256 bits; "
            f"{len(self.indices)} questions are about them"
        ]
        if self.unreadable_images or self.unreadable_training_samples:
            lines.append(
                f"not compared, because unreadable: {self.unreadable_images} images of the "
                f"benchmark, {self.unreadable_training_samples} of the training"
            )
        return "\n".join(lines)


def find_leaks(
    benchmark: Benchmark,
    folder: Path,
    cache: Path | None,
    distance: int,
    progress: Callable[[int, int], None],
) -> Leaks:
    """Hashes both sides and compares them. Raises ValueError without shards or imagehash."""
    check_installed()
    images, unreadable = _hash_benchmark(benchmark)
    training = hashes_of_shards(folder, cache, progress)
    readable = training["image"] != UNREADABLE
    near: dict[int, Near] = {}
    if images:
        exact, looks = (np.stack([hashes[i] for _, hashes in images]) for i in (0, 1))
        near = Finder(exact, looks, distance).find(training)
    shards = Shards(folder)
    return Leaks(
        benchmark=benchmark.name,
        shards=str(folder),
        distance=distance,
        images=len(images),
        unreadable_images=unreadable,
        training_images=int(readable.sum()),
        unreadable_training_samples=int((~readable).sum()),
        matches=[
            _match(images[position][0], found, training, shards)
            for position, found in sorted(near.items())
        ],
    )


def _hash_benchmark(
    benchmark: Benchmark,
) -> tuple[list[tuple[list[str], tuple[np.ndarray, np.ndarray]]], int]:
    """Indices of the questions about an image and its hashes, for each image; and those that
    cannot be read."""
    questions: dict[str, list[Item]] = {}
    for item in benchmark.items:
        questions.setdefault(item.image_key, []).append(item)
    hashed, unreadable = [], 0
    for items in questions.values():
        indices = [item.index for item in items]
        try:
            hashed += [(indices, hash_image(data)) for data in benchmark.images(items[0])]
        except BadSample:
            unreadable += 1
    return hashed, unreadable


def _match(indices: list[str], found: Near, training: np.ndarray, shards: Shards) -> dict[str, Any]:
    hashed = training[found.training]
    row = int(hashed["row"])
    return {
        "indices": indices,
        "exact": found.exact,
        "distance": found.distance,
        "training_key": shards.read_record(row)[0],
        "training_source": shards.source_name(row),
        "training_place": shards.location(row),
        "training_image": int(hashed["image"]),
        "near_training_images": found.count,
    }
