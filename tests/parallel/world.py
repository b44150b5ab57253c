"""Starts a world of CPU processes once and runs a function in each of them."""

from collections.abc import Callable
from typing import Any

from megatron_gmai.runtime.processes import in_processes

MOST_SECONDS = 1200  # of all cases of a world, on a machine that does other things too


def run_world(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(*arguments)` in `size` fresh processes that `initialize_distributed` can join.

    Raises RuntimeError with the traceback of the process that failed.
    """
    in_processes(size, MOST_SECONDS, function, *arguments)
