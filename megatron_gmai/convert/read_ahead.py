"""The next tensors are read while the one before them is written."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_THREADS = 2
_WAITING = 2  # large tensors and small ones take turns: a large one has to be begun in time

Item = TypeVar("Item")


def read_ahead(makers: Iterable[Callable[[], Item]]) -> Generator[Item, None, None]:
    """What the functions return, in their order; threads call the next ones while the caller is at
    work.

    A few items wait at most, so memory grows by the largest that follow one another. What a
    function raises is raised here, after the items before it. Who may stop early closes the
    iterator (`contextlib.closing`): until then the threads go on.
    """
    waiting: deque[Future[Item]] = deque()
    with _one_thread_of_torch(), ThreadPoolExecutor(_THREADS) as readers:
        try:
            for make in makers:
                waiting.append(readers.submit(make))
                if len(waiting) > _WAITING:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # nobody takes what is left
            readers.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_of_torch() -> Iterator[None]:
    """Between two operations torch's threads wait by spinning, on the cores that reading, writing
    and checksums need."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
