"""Progress is told by count and by bytes, whichever are known."""

import pytest

from megatron_gmai.data import progress
from megatron_gmai.data.progress import Progress


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A clock that goes on by ten seconds at each look."""
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    return []


@pytest.mark.parametrize(
    ("items", "size", "done", "expected"),
    [
        (100, 0, (20, 0), "work: 20 of 100, 2/s, 40 s left"),
        (
            100,
            80_000_000,
            (90, 20_000_000),
            "work: 90 of 100, 20 of 80 MB, 2.0 MB/s, 9/s, 30 s left",
        ),
        (0, 80_000_000, (90, 40_000_000), "work: 90, 40 of 80 MB, 4.0 MB/s, 9/s, 10 s left"),
        (100, 0, (100, 5_000_000), "work: 100 of 100, 5 MB, 0.5 MB/s, 10/s, 0 s left"),
        (100, 0, (0, 0), "work: 0 of 100, 0/s, 0 s left"),
    ],
)
def test_a_line_tells_what_is_known(
    lines: list[str], items: int, size: int, done: tuple[int, int], expected: str
) -> None:
    told = Progress(lines.append)
    told.begin("work", items, size)
    told(*done)
    assert lines == [expected]
