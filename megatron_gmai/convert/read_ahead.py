"""The next tensor is read while the one before it is written."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items; a thread makes one while the caller is at work with the one before.

    One item waits at most, so memory grows by the largest item. What making an item raises is
    raised here.
    """
    source = iter(items)
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(next, source, _END)
        while (item := waiting.result()) is not _END:
            waiting = reader.submit(next, source, _END)
            yield item  # type: ignore[misc]  # not the end


_END = object()
