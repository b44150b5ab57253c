"""Runs a function as a world of fresh processes, so that a check that dies ends nothing else."""

import contextlib
import os
import random
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessException


def in_processes(
    size: int,
    seconds: float,
    function: Callable[..., Any],
    *arguments: Any,
    start_method: str = "spawn",
) -> Any:
    """What `function(*arguments)` returns in the first of `size` processes, which torch can join.

    `start_method` is multiprocessing's: a "forkserver" may have imported what the function needs.

    Raises TimeoutError after so many seconds, RuntimeError with the traceback of one that fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        context = torch.multiprocessing.start_processes(
            _member,
            (size, free_port(), result, function, arguments),
            nprocs=size,
            join=False,
            start_method=start_method,
        )
        deadline = time.monotonic() + seconds
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    for process in context.processes:
                        process.kill()
                    raise TimeoutError(f"stopped after {seconds:.0f} s")
        except ProcessException as error:
            raise RuntimeError(str(error).strip()) from error
        # Any object: the file is this function's own, in a folder that only its user can enter.
        return torch.load(result, weights_only=False)


# Below those that systems give to whoever asks for any (Linux from 32768 on): gloo asks for many,
# and could be given the same one before our process listens there.
PORTS = range(10_000, 32_000)


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.SystemRandom().choice(PORTS)))
            return int(probe.getsockname()[1])


def _member(
    rank: int,
    size: int,
    port: int,
    result: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    found = function(*arguments)
    if rank == 0:
        torch.save(found, result)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the others may still be sending
    os._exit(0)  # threads of gloo must not delay the end
