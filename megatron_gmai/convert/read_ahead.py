"""The next tensor is read while the one before it is written."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")


def read_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items; a thread makes one while the caller is at work with the one before.

    One item waits at most, so memory grows by the largest item. What making an item raises is
    raised here.
    """
    source = iter(items)
    with _one_thread_of_torch(), ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(next, source, _END)
        while (item := waiting.result()) is not _END:
            waiting = reader.submit(next, source, _END)
            yield item  # type: ignore[misc]  # not the end


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


_END = object()
