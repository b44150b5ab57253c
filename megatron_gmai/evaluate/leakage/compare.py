"""Which hashes of a large set equal or resemble those of a small one, in bounded memory.

Two hashes of 256 bits that differ in fewer bits than there are pieces of 16 bits have a piece in
common (pigeonhole; Norouzi, Punjani and Fleet 2012). So only pairs with such a piece are compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_gmai.evaluate.leakage.hashes import UNREADABLE, WORDS

PIECES = WORDS * 4
MOST_DISTANCE = PIECES - 1
_KEYS = 2**16
_BLOCK = 2**16  # training hashes at a time
_PAIRS = 2**21  # compared at a time
_NO_MATCH = np.iinfo(np.int64).max
_ROWS = 2**40  # more than there are training images


@dataclass(frozen=True)
class Near:
    """The nearest training image of an evaluation image, and how many are near enough."""

    training: int  # place among the training hashes
    distance: int  # bits
    exact: bool  # equal pixels
    count: int


class Finder:
    """The evaluation's hashes, ordered by each of their pieces."""

    def __init__(self, exact: np.ndarray, looks: np.ndarray, most_distance: int) -> None:
        """uint64 [E, 2] and [E, WORDS]. Raises ValueError for a distance that cannot be found."""
        if not 0 <= most_distance <= MOST_DISTANCE:
            raise ValueError(f"distance {most_distance}: must be from 0 to {MOST_DISTANCE} bits")
        self.exact, self.looks = exact, np.ascontiguousarray(looks)
        self.most_distance = most_distance
        pieces = _pieces(self.looks)
        self._orders = [np.argsort(pieces[:, p], kind="stable") for p in range(PIECES)]
        self._starts = [
            np.searchsorted(pieces[order, p], np.arange(_KEYS + 1))
            for p, order in enumerate(self._orders)
        ]

    def find(self, training: np.ndarray) -> dict[int, Near]:
        """The nearest training image by place in the evaluation; `training` is HASHED."""
        # One number orders matches: fewer bits first, then equal pixels, then the earlier place.
        best = np.full(len(self.looks), _NO_MATCH)
        counts = np.zeros(len(self.looks), dtype=np.int64)
        for first in range(0, len(training), _BLOCK):
            block = np.array(training[first : first + _BLOCK])
            for mine, theirs, distance, exact in self._matches(block):
                rank = 2 * distance + ~exact
                np.minimum.at(best, mine, rank.astype(np.int64) * _ROWS + first + theirs)
                np.add.at(counts, mine, 1)
        return {
            int(position): _near(int(best[position]), int(counts[position]))
            for position in np.flatnonzero(counts)
        }

    def _matches(
        self, block: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Place in the evaluation, place in the block, bits, equal pixels: each pair once."""
        looks = np.ascontiguousarray(block["looks"])
        pieces = _pieces(looks)
        readable = block["image"] != UNREADABLE
        for piece in range(PIECES):
            for mine, theirs in self._candidates(piece, pieces[:, piece]):
                differing = self.looks[mine] ^ looks[theirs]
                bits = np.bitwise_count(differing).sum(axis=1)
                near = np.flatnonzero((bits <= self.most_distance) & readable[theirs])
                # A pair with several pieces in common is met several times; the first one counts.
                near = near[(_pieces(differing[near]) == 0).argmax(axis=1) == piece]
                mine, theirs = mine[near], theirs[near]
                exact = (self.exact[mine] == block["exact"][theirs]).all(axis=1)
                yield mine, theirs, bits[near], exact

    def _candidates(self, piece: int, keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs with this piece in common, a bounded number at a time."""
        starts = self._starts[piece][keys]
        counts = self._starts[piece][keys.astype(np.int64) + 1] - starts
        rows = np.flatnonzero(counts)
        ends = np.cumsum(counts[rows])
        total = int(ends[-1]) if len(ends) else 0
        for low in range(0, total, _PAIRS):
            pair = np.arange(low, min(low + _PAIRS, total))
            own = np.searchsorted(ends, pair, side="right")  # which row a pair belongs to
            within = pair - (ends[own] - counts[rows[own]])
            yield self._orders[piece][starts[rows[own]] + within], rows[own]


def _pieces(looks: np.ndarray) -> np.ndarray:
    """uint64 [N, WORDS] as uint16 [N, PIECES]."""
    return looks.view(np.uint16).reshape(len(looks), PIECES)


def _near(best: int, count: int) -> Near:
    rank, training = divmod(best, _ROWS)
    return Near(training, rank // 2, exact=rank % 2 == 0, count=count)
