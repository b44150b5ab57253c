"""What several packages' tests share: a world of one process, and a small real data set."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.parallel.cases import Processes

# Threads that wait by spinning make several processes on few cores very slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def alone() -> Iterator["Processes"]:
    """A world of this process alone on the emulated device; torch is itself again afterwards."""
    from tests.parallel.cases import (
        Processes,  # here, so that other tests need not wait for Megatron
    )

    world = Processes()
    yield world
    world.close()
