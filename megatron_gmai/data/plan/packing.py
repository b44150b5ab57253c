"""Packing: which samples share a pack of `max_length` tokens.

Every method takes the samples' lengths in the order in which they come and is a pure function of
them. No method exceeds `max_length`; only `hard` cuts samples, and never inside an image.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Tokens start up to stop of a sample (a row of the index)."""

    sample: int
    start: int
    stop: int


class ImageCap(NamedTuple):
    """A pack holds `most` images at most; `images` int [samples], none of them above that."""

    images: np.ndarray
    most: int


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


def pack_soft(lengths: np.ndarray, max_length: int, cap: ImageCap | None = None) -> Packs:
    """Next fit, GMAI-VL's `soft`: a pack is closed by the first sample that does not fit."""
    limits = [(np.cumsum(lengths, dtype=np.int64).tolist(), max_length)]
    if cap is not None:
        limits.append((np.cumsum(cap.images, dtype=np.int64).tolist(), cap.most))
    bounds = [0]
    while bounds[-1] < len(lengths):
        first = bounds[-1]
        before = [ends[first - 1] if first else 0 for ends, _ in limits]
        bounds.append(
            min(
                bisect_right(ends, start + most, first)
                for (ends, most), start in zip(limits, before, strict=True)
            )
        )
    return _whole(lengths, np.arange(len(lengths)), bounds)


def pack_hard(
    lengths: np.ndarray, images_end: np.ndarray, max_length: int, cap: ImageCap | None = None
) -> Packs:
    """GMAI-VL's `hard`: samples are laid end to end and cut every `max_length` tokens.

    A sample is cut only behind its last image (`images_end`): where the cut would fall before,
    or where its images are too many, the pack ends early and the sample begins the next one.
    """
    pieces: list[tuple[int, int, int]] = []
    bounds = [0]
    room, slots = max_length, cap.most if cap else 0
    counts = cap.images.tolist() if cap else [0] * len(lengths)
    for sample, (length, head, images) in enumerate(
        zip(lengths.tolist(), images_end.tolist(), counts, strict=True)
    ):
        start = 0
        while start < length:
            stop = min(length, start + room)
            if stop >= head and (start > 0 or images <= slots):
                pieces.append((sample, start, stop))
                room -= stop - start
                slots -= images if start == 0 else 0
                start = stop
            if start < length or room == 0:
                bounds.append(len(pieces))
                room, slots = max_length, cap.most if cap else 0
    if bounds[-1] < len(pieces):
        bounds.append(len(pieces))
    table = np.array(pieces, dtype=np.int64).reshape(-1, 3)
    return Packs(table[:, 0], table[:, 1], table[:, 2], np.array(bounds, dtype=np.int64))


def pack_best_fit(lengths: np.ndarray, max_length: int, cap: ImageCap | None = None) -> Packs:
    """Best fit in order of decreasing length: each sample goes where it leaves least room.

    The free rooms of all open packs with the same number of image slots left are one integer with
    a bit a size, so the tightest one is found by two operations on a `max_length`-bit number;
    samples that are equal in length and images go in bulk.
    """
    most = cap.most if cap else 0
    kinds = (max_length - lengths) * (most + 1) + (most - cap.images if cap else 0)
    order = _stable_order(kinds, (max_length + 1) * (most + 1))
    counts = np.bincount(kinds)
    open_packs: list[list[list[int]]] = [  # by slots and room
        [[] for _ in range(max_length + 1)] for _ in range(most + 1)
    ]
    rooms = [0] * (most + 1)  # by slots; bit r: there are open packs with room r
    pack_of: list[int] = []  # pack of each sample in `order`
    packs = 0
    for kind in np.flatnonzero(counts).tolist():
        count, length, images = int(counts[kind]), max_length - kind // (most + 1), 0
        if cap:
            images = most - kind % (most + 1)
        while count:
            fitting = (reduce(or_, rooms[images:]) if cap else rooms[0]) >> length
            room, slots = max_length, most
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                if cap:
                    slots = next(s for s in range(images, most + 1) if rooms[s] >> room & 1)
            # A roomy pack takes several of these.
            each = min(room // length, slots // images) if images else room // length
            wanted = -(-count // each)
            if fitting:
                chosen = open_packs[slots][room][-wanted:]
                del open_packs[slots][room][-wanted:]
                if not open_packs[slots][room]:
                    rooms[slots] ^= 1 << room
            else:
                chosen = list(range(packs, packs + wanted))
                packs += wanted
            pack_of += chosen
            count -= len(chosen)
            if room > length:
                open_packs[slots - images][room - length] += chosen
                rooms[slots - images] |= 1 << (room - length)
    return _grouped(lengths, order, np.array(pack_of, dtype=np.int64), packs)


def _stable_order(values: np.ndarray, most: int) -> np.ndarray:
    """Stable argsort of whole numbers 0 to `most`; numpy sorts 16-bit ones ten times faster."""
    return np.argsort(values.astype(np.uint16) if most < 2**16 else values, kind="stable")


def _grouped(lengths: np.ndarray, order: np.ndarray, pack_of: np.ndarray, packs: int) -> Packs:
    """Packs of uncut samples, from the pack of each sample in `order`."""
    by_pack = _stable_order(pack_of, packs)
    bounds = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=packs))])
    return _whole(lengths, order[by_pack], bounds)
