"""Starts worlds of CPU processes and runs a function in each of them."""

from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from typing import Any
from unittest import mock

from megatron_gmai.runtime.processes import in_processes

MOST_SECONDS = 1200  # of all cases of a world, on a machine that does other things too
IMPORTED = ["tests.parallel.cases", "megatron_gmai.training.setup", "megatron_gmai.preflight.first"]


def run_world(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(*arguments)` in `size` new processes that `initialize_distributed` can join.

    Raises RuntimeError with the traceback of the process that failed.
    """
    with mock.patch.object(forkserver, "connect_to_new_process", _server().connect_to_new_process):
        in_processes(size, MOST_SECONDS, function, *arguments, start_method="forkserver")


@cache
def _server() -> forkserver.ForkServer:
    """Forks processes that need not import Megatron-Core, which takes each several seconds. It is
    not multiprocessing's own, from which the data loader forks its workers."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload(IMPORTED)
    return server
