"""What several packages' tests share: a world of one process, and a small real data set."""

import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.parallel.cases import Processes

# Threads that wait by spinning make several processes on few cores very slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tiers, by folder: what starts worlds of processes or whole programs, what compiles kernels, what
# takes steps on devices that do not exist.
TIERS = {
    "parallel": "worlds",
    "training": "worlds",
    "cluster": "worlds",
    "evaluate": "worlds",
    "kernels": "kernels",
    "dry_run": "dry",
    "planner": "dry",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with its tier: `quick` needs neither of these.

    Dry runs come last: the device type that they register stays in the process, and torch would
    ask it for streams in other tests. Of their files those with the most tests come first, so that
    the processes, which take whole files, end at about the same time.
    """
    root = Path(__file__).parent
    for item in items:
        item.add_marker(TIERS.get(_folder(item, root), "quick"))
    tests_of = Counter(item.path for item in items)
    items.sort(
        key=lambda item: (
            tests_of[item.path] if _folder(item, root) in ("dry_run", "planner") else math.inf
        ),
        reverse=True,
    )


def _folder(item: pytest.Item, root: Path) -> str:
    return item.path.relative_to(root).parts[0]


@pytest.fixture
def alone() -> Iterator["Processes"]:
    """A world of this process alone on the emulated device; torch is itself again afterwards."""
    from tests.parallel.cases import (
        Processes,  # here, so that other tests need not wait for Megatron
    )

    world = Processes()
    yield world
    world.close()
