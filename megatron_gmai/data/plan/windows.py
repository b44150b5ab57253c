"""The windows of an epoch: which samples each takes, and how they are packed.

An epoch is cut into windows. Each data set's shards are shuffled, and each window takes the same
share of every data set from neighbouring shards, so reads stay local while every window has the
mixture of the whole. Samples are shuffled and packed inside their window. All of it is a pure
function of (seed, epoch, index, settings): ranks, workers and history appear nowhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_gmai.data.plan.order import permutation
from megatron_gmai.data.plan.packing import (
    ImageCap,
    Packs,
    pack_best_fit,
    pack_hard,
    pack_none,
    pack_soft,
)

# A length of 0 marks a sample that cannot be used; a cut may fall at images_end or behind it.
LENGTH_ROW = np.dtype([("length", "<i4"), ("images_end", "<i4")])
WINDOW = 32_768  # samples
# What a permutation is for: the third number of its counter, after seed and epoch.
SHARD_ORDER, ROW_ORDER, SAMPLE_ORDER, PACK_ORDER = 1, 2, 3, 4


@dataclass(frozen=True)
class PlanSettings:
    """All that the order depends on besides the index. `run` is the number of packs that
    `group_by_length` keeps together: a global batch."""

    seed: int
    max_length: int
    pack_level: str
    group_by_length: bool = False
    run: int = 512
    window: int = WINDOW
    max_images: int | None = None  # in a pack


class Windows:
    """Plans any window of any epoch, one at a time."""

    def __init__(
        self,
        lengths: np.ndarray,
        first_rows: np.ndarray,
        shard_sources: Sequence[int] | np.ndarray,
        ratios: Sequence[float],
        settings: PlanSettings,
        images: np.ndarray | None = None,
    ) -> None:
        """`lengths` [samples] is the table of `lengths.py`, `first_rows` [shards + 1] the rows of
        each shard, `shard_sources` the data set of each shard, `ratios` [data sets] the samples an
        epoch takes for each one that there is. `images` [samples] is needed where packs have a
        limit of them."""
        self.lengths, self.first_rows, self.settings = lengths, first_rows, settings
        self.ratios, self._images = list(ratios), images
        sources = np.asarray(shard_sources)
        self._shards = [np.flatnonzero(sources == s) for s in range(len(self.ratios))]
        self._streams = lru_cache(maxsize=2)(self._make_streams)
        samples = sum(stream.total for stream in self._streams(0))
        self.per_epoch = max(1, round(samples / settings.window))

    def plan(self, epoch: int, window: int) -> Packs:
        """The packs of one window, in the order in which they are trained on."""
        samples = self._window_samples(epoch, window)
        order = permutation(len(samples), self.settings.seed, epoch, SAMPLE_ORDER, window)
        samples = samples[order]
        table = self.lengths[samples].astype(LENGTH_ROW)
        if self.settings.group_by_length:
            by_length = np.argsort(-table["length"], kind="stable")
            samples, table = samples[by_length], table[by_length]
        packs = self._pack(table, self._cap(samples))
        packs = packs.reordered(self._pack_order(len(packs), epoch, window))
        return Packs(samples[packs.samples], packs.starts, packs.stops, packs.bounds)

    def _cap(self, samples: np.ndarray) -> ImageCap | None:
        if self.settings.max_images is None:
            return None
        if self._images is None:
            raise ValueError("a limit of images per pack needs the number of images per sample")
        return ImageCap(self._images[samples].astype(np.int64), self.settings.max_images)

    def _pack(self, table: np.ndarray, cap: ImageCap | None) -> Packs:
        level, max_length = self.settings.pack_level, self.settings.max_length
        if level == "soft":
            return pack_soft(table["length"], max_length, cap)
        if level == "hard":
            return pack_hard(table["length"], table["images_end"], max_length, cap)
        if level == "best-fit":
            return pack_best_fit(table["length"], max_length, cap)
        if level == "none":
            return pack_none(table["length"])
        raise ValueError(f"--dset-pack-level {level!r} is unknown")

    def _pack_order(self, packs: int, epoch: int, window: int) -> np.ndarray:
        """Packs leave the packer sorted in some way; a step must be a fair sample of the window.
        With `group_by_length`, runs of like packs stay together and the runs are shuffled."""
        run = self.settings.run if self.settings.group_by_length else 1
        counter = (self.settings.seed, epoch, PACK_ORDER, window)
        runs = permutation(-(-packs // run), *counter)
        order = (runs[:, None] * run + np.arange(run)).ravel()
        return order[order < packs]

    def _window_samples(self, epoch: int, window: int) -> np.ndarray:
        """Rows of the usable samples of a window, int64, data set after data set."""
        parts = [np.empty(0, dtype=np.int64)]
        for stream in self._streams(epoch):
            start = window * stream.total // self.per_epoch
            stop = (window + 1) * stream.total // self.per_epoch
            parts += [self._rows(epoch, *part) for part in stream.parts(start, stop)]
        samples = np.concatenate(parts)
        return samples[self.lengths["length"][samples] > 0]

    def _rows(self, epoch: int, repeat: int, shard: int, start: int, stop: int) -> np.ndarray:
        first = int(self.first_rows[shard])
        count = int(self.first_rows[shard + 1]) - first
        if stop - start == count:  # the window shuffles them anyway
            return np.arange(first, first + count)
        order = permutation(count, self.settings.seed, epoch, ROW_ORDER, repeat, shard)
        return first + order[start:stop]

    def _make_streams(self, epoch: int) -> list["_Stream"]:
        return [self._stream(epoch, source) for source in range(len(self.ratios))]

    def _stream(self, epoch: int, source: int) -> "_Stream":
        """A ratio of 2.3 is two passes over all shards, then one that takes 0.3 of each shard."""
        whole, rest = divmod(self.ratios[source], 1.0)
        shares = [1.0] * int(whole) + ([rest] if rest > 0 else [])
        shards = self._shards[source]
        sizes = np.diff(self.first_rows)[shards]
        orders, takes = [], []
        for repeat, share in enumerate(shares):
            order = permutation(len(shards), self.settings.seed, epoch, SHARD_ORDER, repeat, source)
            ends = np.floor(np.cumsum(sizes[order]) * share + 0.5).astype(np.int64)
            orders.append(shards[order])
            takes.append(np.diff(ends, prepend=0))
        repeats = np.repeat(np.arange(len(shares)), len(shards))
        none = [np.empty(0, dtype=np.int64)]
        return _Stream(repeats, np.concatenate(none + orders), np.concatenate(none + takes))


class _Stream:
    """One data set in one epoch: so many samples of this shard, so many of that one, ..."""

    def __init__(self, repeats: np.ndarray, shards: np.ndarray, takes: np.ndarray) -> None:
        self.repeats, self.shards = repeats, shards
        self.bounds = np.concatenate([[0], np.cumsum(takes)]).astype(np.int64)
        self.total = int(self.bounds[-1])

    def parts(self, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """Positions start up to stop as (repeat, shard, first, last) pieces of shards."""
        if start == stop:
            return []
        first = int(np.searchsorted(self.bounds, start, side="right")) - 1
        last = int(np.searchsorted(self.bounds, stop, side="left"))
        return [
            (
                int(self.repeats[i]),
                int(self.shards[i]),
                max(0, start - int(self.bounds[i])),
                min(stop, int(self.bounds[i + 1])) - int(self.bounds[i]),
            )
            for i in range(first, last)
        ]
