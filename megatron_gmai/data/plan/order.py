"""Counter-based shuffles: an order is a pure function of numbers, not of a generator's history.

Philox is counted and keyed (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011);
its raw stream is fixed by definition, so the order is the same on every machine and numpy version.
"""

import numpy as np


def permutation(count: int, *counter: int) -> np.ndarray:
    """A permutation of range(count), int64, that depends on `counter` alone (5 numbers at most)."""
    mask = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    numbers = np.arange(count, dtype=np.uint64)
    # Sorting words that end in their own number is several times faster than an argsort, and
    # leaves no ties.
    words = np.sort((random_words(count, *counter) & ~mask) | numbers)
    return (words & mask).astype(np.int64)


def random_words(count: int, *counter: int) -> np.ndarray:
    """`count` random uint64 that depend on `counter` alone.

    The first two numbers are Philox's key, the others the upper words of its counter; the lowest
    word counts the output.
    """
    if len(counter) > 5:
        raise ValueError(f"a counter has at most 5 numbers, found {len(counter)}")
    words = [number % 2**64 for number in counter] + [0] * (5 - len(counter))
    return np.random.Philox(key=words[:2], counter=[0, *words[2:]]).random_raw(count)
