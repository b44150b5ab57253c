"""What several packages' tests share: a world of one process, and a small real data set."""

import os
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
    ask it for streams in other tests.
    """
    root = Path(__file__).parent
    for item in items:
        item.add_marker(TIERS.get(_folder(item, root), "quick"))
    items.sort(key=lambda item: _folder(item, root) in ("dry_run", "planner"))


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
