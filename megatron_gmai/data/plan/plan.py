"""The plan: the endless stream of packs, epoch after epoch, addressed by their numbers.

A pack's number is all that a run has to remember. Where the pack lies (epoch, window, place in it)
follows from how many packs the windows before it have, which only planning them tells; what is
known of that is kept: in memory, in files beside the index, in the bookmarks of checkpoints.
"""

import contextlib
import io
from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.plan.packing import Packs, join
from megatron_gmai.data.plan.windows import Windows

CACHED_WINDOWS = 16  # fewer are planned faster than read


class Mark(NamedTuple):
    """A window of the endless stream, by the number of its first pack."""

    pack: int
    epoch: int
    window: int


@dataclass(frozen=True)
class Bookmark:
    """Where a run stands in its plan, for one that goes on from there without planning what lies
    behind. It says nothing that the number of consumed packs does not, and holds for one plan."""

    plan: str  # fingerprint
    pack: int  # the first of a window
    epoch: int
    window: int
    epoch_starts: Sequence[int]  # first pack of epochs 0, 1, ..., as far as they are counted


class Plan:
    """Packs of every epoch, planned a window at a time."""

    def __init__(self, windows: Windows, cache: Path | None = None) -> None:
        """`cache` is the beginning of the names of files that keep what `counts` found; it has to
        be a name that changes with everything that the windows depend on."""
        self.windows, self._cache = windows, cache
        self._window = lru_cache(maxsize=2)(windows.plan)
        self._counts: dict[int, np.ndarray | None] = {}  # None: no file has them
        self._marks = [Mark(0, 0, 0)]  # sorted: where windows were found to begin
        self.epoch_starts = [0]  # first packs, as far as epochs are counted

    def bookmark(self, pack: int, fingerprint: str) -> Bookmark:
        """For a run that goes on at `pack`; `fingerprint` names this plan."""
        mark = self._find(pack) or self._marks[-1]
        return Bookmark(fingerprint, *mark, tuple(self.epoch_starts))

    def open_at(self, bookmark: Bookmark) -> None:
        """Takes over what another process has found out about this plan."""
        mark = Mark(bookmark.pack, bookmark.epoch, bookmark.window)
        self._marks = [self._marks[0], mark]
        self.epoch_starts = list(bookmark.epoch_starts)

    def counts(self, epoch: int) -> np.ndarray:
        """int64 [windows]: packs in each window of an epoch. It has to be planned whole for that,
        unless somebody has done so and left a file."""
        counts = self._kept_counts(epoch)
        if counts is None:
            sizes = [len(self.windows.plan(epoch, w)) for w in range(self.windows.per_epoch)]
            counts = self._counts[epoch] = np.array(sizes, dtype=np.int64)
            self._keep(epoch, counts)
        return counts

    def _kept_counts(self, epoch: int) -> np.ndarray | None:
        if epoch not in self._counts:
            file = self._file(epoch)
            counts = np.load(file) if file is not None and file.exists() else np.empty(0)
            fitting = counts.shape == (self.windows.per_epoch,)
            self._counts[epoch] = counts if fitting else None
        return self._counts[epoch]

    def _keep(self, epoch: int, counts: np.ndarray) -> None:
        file, buffer = self._file(epoch), io.BytesIO()
        if file is None:
            return
        np.save(buffer, counts)
        with contextlib.suppress(OSError):  # a folder that cannot be written only costs time
            write_atomically(file, buffer.getvalue())

    def _file(self, epoch: int) -> Path | None:
        if self._cache is None or self.windows.per_epoch < CACHED_WINDOWS:
            return None
        return self._cache.with_name(f"{self._cache.name}-epoch{epoch}.npy")

    def total(self, epoch: int) -> int:
        """Packs of an epoch. All epochs up to it are counted, if nobody has."""
        while len(self.epoch_starts) < epoch + 2:
            last = len(self.epoch_starts) - 1
            packs = 0 if self._ended else int(self.counts(last).sum())
            self.epoch_starts.append(self.epoch_starts[-1] + packs)
        return self.epoch_starts[epoch + 1] - self.epoch_starts[epoch]

    @property
    def _ended(self) -> bool:
        """An epoch without packs ends the stream: there may never be any."""
        return self.epoch_starts[-1:] == self.epoch_starts[-2:-1]

    def packs(self, start: int, stop: int) -> Packs:
        """Packs start up to stop of the endless stream: epoch 0's packs, epoch 1's, ..."""
        parts = []
        while start < stop and (mark := self._find(start)) is not None:
            packs = self._window(mark.epoch, mark.window)
            inside = start - mark.pack
            taken = min(stop - start, len(packs) - inside)
            parts.append(packs.part(inside, inside + taken))
            start += taken
        return join(parts)

    def _find(self, pack: int) -> Mark | None:
        """The window that holds a pack, looked for from the last one before it that is known; None
        behind the end."""
        epoch = bisect_right(self.epoch_starts, pack) - 1
        known = self._marks[bisect_right(self._marks, (pack + 1,)) - 1]
        mark = max(known, Mark(self.epoch_starts[epoch], epoch, 0))
        while not (self._ended and pack >= self.epoch_starts[-1]):
            after = self._after(mark)
            if after.pack > pack:
                return mark
            if after.epoch == len(self.epoch_starts):
                self.epoch_starts.append(after.pack)
            insort(self._marks, after)
            mark = after
        return None

    def _after(self, mark: Mark) -> Mark:
        counts = self._kept_counts(mark.epoch)
        if counts is None:
            size = len(self._window(mark.epoch, mark.window))
        else:
            size = int(counts[mark.window])
        last = mark.window + 1 == self.windows.per_epoch
        following = (mark.epoch + 1, 0) if last else (mark.epoch, mark.window + 1)
        return Mark(mark.pack + size, *following)
