"""Starts a world of CPU processes once and runs a function in each of them."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch.multiprocessing


def run_world(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(*arguments)` in `size` fresh processes that `initialize_distributed` can join.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the process that failed.
    """
    torch.multiprocessing.start_processes(
        _member, (size, free_port(), function, arguments), nprocs=size, start_method="spawn"
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _member(
    rank: int, size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    function(*arguments)
    # Leave as the entry script does when it fails: threads of gloo must not delay the end.
    os._exit(0)
