"""Packing: which samples share a pack of `max_length` tokens.

Every method takes the samples' lengths in the order in which they come and is a pure function of
them. No method exceeds `max_length`; only `hard` cuts samples, and never inside an image.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Tokens start up to stop of a sample (a row of the index)."""

    sample: int
    start: int
    stop: int


@dataclass(frozen=True)
class Packs:
    """P packs of pieces: pack p holds pieces bounds[p] up to bounds[p + 1]; piece i is tokens
    starts[i] up to stops[i] of sample samples[i]."""

    samples: np.ndarray  # int64 [pieces]
    starts: np.ndarray  # int64 [pieces]
    stops: np.ndarray  # int64 [pieces]
    bounds: np.ndarray  # int64 [P + 1]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def pieces(self, pack: int) -> list[Piece]:
        """The pieces of one pack, in order."""
        inside = slice(int(self.bounds[pack]), int(self.bounds[pack + 1]))
        columns = (self.samples[inside], self.starts[inside], self.stops[inside])
        return [Piece(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]

    def part(self, first: int, last: int) -> "Packs":
        """Packs first up to last."""
        inside = slice(int(self.bounds[first]), int(self.bounds[last]))
        bounds = self.bounds[first : last + 1] - self.bounds[first]
        return Packs(self.samples[inside], self.starts[inside], self.stops[inside], bounds)

    def filled_up(self, count: int) -> "Packs":
        """These packs and as many empty ones as make `count`."""
        empty = np.full(count - len(self), self.bounds[-1])
        bounds = np.concatenate([self.bounds, empty])
        return Packs(self.samples, self.starts, self.stops, bounds)

    def reordered(self, order: np.ndarray) -> "Packs":
        """The same packs in another order; pieces keep their order inside a pack."""
        sizes = np.diff(self.bounds)[order]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        inside = np.arange(bounds[-1]) - np.repeat(bounds[:-1], sizes)
        pieces = np.repeat(self.bounds[:-1][order], sizes) + inside
        return Packs(self.samples[pieces], self.starts[pieces], self.stops[pieces], bounds)


def join(parts: Sequence[Packs]) -> Packs:
    """All packs of all parts, in order."""
    sizes = np.concatenate([np.diff(part.bounds) for part in parts] or [np.empty(0, np.int64)])
    empty = [np.empty(0, dtype=np.int64)]
    return Packs(
        np.concatenate([part.samples for part in parts] or empty),
        np.concatenate([part.starts for part in parts] or empty),
        np.concatenate([part.stops for part in parts] or empty),
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    )


def _whole(lengths: np.ndarray, order: np.ndarray, bounds: Sequence[int] | np.ndarray) -> Packs:
    """Packs of uncut samples."""
    order = order.astype(np.int64)
    stops = lengths[order].astype(np.int64)
    return Packs(order, np.zeros_like(stops), stops, np.asarray(bounds, dtype=np.int64))


def pack_none(lengths: np.ndarray) -> Packs:
    """One sample a pack."""
    order = np.arange(len(lengths))
    return _whole(lengths, order, list(range(len(lengths) + 1)))


def pack_soft(lengths: np.ndarray, max_length: int) -> Packs:
    """Next fit, GMAI-VL's `soft`: a pack is closed by the first sample that does not fit."""
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    bounds = [0]
    while bounds[-1] < len(ends):
        first = bounds[-1]
        before = ends[first - 1] if first else 0
        bounds.append(bisect_right(ends, before + max_length, first))
    return _whole(lengths, np.arange(len(ends)), bounds)


def pack_hard(lengths: np.ndarray, images_end: np.ndarray, max_length: int) -> Packs:
    """GMAI-VL's `hard`: samples are laid end to end and cut every `max_length` tokens.

    A sample is cut only behind its last image (`images_end`): where the cut would fall before,
    the pack ends early and the sample begins the next one.
    """
    pieces: list[tuple[int, int, int]] = []
    bounds = [0]
    room = max_length
    for sample, (length, head) in enumerate(
        zip(lengths.tolist(), images_end.tolist(), strict=True)
    ):
        start = 0
        while start < length:
            stop = min(length, start + room)
            if stop >= head:
                pieces.append((sample, start, stop))
                room -= stop - start
                start = stop
            if start < length or room == 0:
                bounds.append(len(pieces))
                room = max_length
    if bounds[-1] < len(pieces):
        bounds.append(len(pieces))
    table = np.array(pieces, dtype=np.int64).reshape(-1, 3)
    return Packs(table[:, 0], table[:, 1], table[:, 2], np.array(bounds, dtype=np.int64))


def pack_best_fit(lengths: np.ndarray, max_length: int) -> Packs:
    """Best fit in order of decreasing length: each sample goes where it leaves least room.

    The free rooms of all open packs are one integer with a bit a size, so the tightest one is
    found by two operations on a `max_length`-bit number; samples of equal length go in bulk.
    """
    order = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    open_packs: list[list[int]] = [[] for _ in range(max_length + 1)]  # by free room
    rooms = 0  # bit r: there are open packs with room r
    pack_of: list[int] = []  # pack of each sample in `order`
    packs = 0
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else max_length
            wanted = -(-count // (room // length))  # a roomy pack takes several of these
            if fitting:
                chosen = open_packs[room][-wanted:]
                del open_packs[room][-wanted:]
                if not open_packs[room]:
                    rooms ^= 1 << room
            else:
                chosen = list(range(packs, packs + wanted))
                packs += wanted
            pack_of += chosen
            count -= len(chosen)
            if room > length:
                open_packs[room - length] += chosen
                rooms |= 1 << (room - length)
    return _grouped(lengths, order, np.array(pack_of, dtype=np.int64), packs)


def _grouped(lengths: np.ndarray, order: np.ndarray, pack_of: np.ndarray, packs: int) -> Packs:
    """Packs of uncut samples, from the pack of each sample in `order`."""
    by_pack = np.argsort(pack_of, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=packs))])
    return _whole(lengths, order[by_pack], bounds)
