"""Checks a cluster before a run: give it the run's own flags, and start it the same way.

    torchrun --nproc-per-node 8 tools/preflight.py @examples/recipes/phase1.args --work-dir ...

Prints a table of pass, warn and fail with the remedy of each, and exits with status 1 if a check
failed. It takes half a minute and leaves no file behind.
"""

import contextlib
import os
import socket
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_gmai.cli import parse
from megatron_gmai.config import Config
from megatron_gmai.runtime.quiet import quiet_libraries
from megatron_gmai.training.resilience import run_guarded

if TYPE_CHECKING:
    from megatron_gmai.preflight.check import Check
    from megatron_gmai.runtime.device import Device


def main() -> None:
    config, _ = parse(sys.argv[1:])
    # Imported once the flags are known to be right: `--help` and mistakes answer at once.
    quiet_libraries()
    import torch.distributed as dist

    from megatron_gmai.preflight.check import FAIL, merge, table
    from megatron_gmai.preflight.collectives import collectives
    from megatron_gmai.runtime.world import close_world, open_world
    from megatron_gmai.validation import validate_layout

    validate_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
    world = open_world(config)
    device = world.device
    checks = [*local_checks(config, device), *collectives(config, device, world.groups)]
    by_rank: list[list[Check]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, checks)
    merged = merge(by_rank)
    if world.is_first_rank:
        print(table(merged), flush=True)
    close_world()
    sys.exit(1 if any(check.status == FAIL for check in merged) else 0)


def local_checks(config: Config, device: "Device") -> "Iterator[Check]":
    """What each process finds out for itself, and the folder that they share."""
    import torch.distributed as dist

    from megatron_gmai.preflight import machine, storage
    from megatron_gmai.preflight.check import guarded
    from megatron_gmai.preflight.memory import PLAN, fits_memory
    from megatron_gmai.preflight.settings import settings
    from megatron_gmai.runtime.device import local_rank

    rank, world = dist.get_rank(), dist.get_world_size()
    yield settings(config, world)
    yield from machine.versions()
    yield from guarded("driver and torch", lambda: machine.driver(device), "mend the driver")
    yield from guarded("device", lambda: machine.device_memory(device), "mend the driver")
    yield from machine.shared_memory()
    yield from guarded("plan fits memory", lambda: fits_memory(config, device, rank, world), PLAN)
    folder, work_dir = Path(config.run.save or ""), Path(config.run.work_dir)
    count = storage.checkpoints_kept(config)
    size = storage.checkpoint_bytes(config, storage.DTYPES[str(device.dtype)])
    if local_rank() == 0:
        writable = "make the folder writable, or give another --work-dir"
        yield from guarded(
            "room for checkpoints", lambda: storage.room(folder, size, count), writable
        )
        yield from guarded(
            "speed of checkpoints", lambda: storage.write_speed(folder, size, rank), writable
        )
    yield from _shared_folder(work_dir, rank)
    data = config.data
    shards = data.shards or (data.dset_cache_dir if data.dset_from_cache else None)
    yield from guarded(
        "shards", lambda: storage.shards(shards, rank, world), "make them: tools/make_shards.py"
    )


def _shared_folder(work_dir: Path, rank: int) -> "Iterator[Check]":
    import torch.distributed as dist

    from megatron_gmai.preflight import storage
    from megatron_gmai.preflight.check import guarded

    token = [uuid.uuid4().hex]
    dist.broadcast_object_list(token, src=0)
    remedy = "put --work-dir where every node can write"
    if rank == 0:
        yield from guarded("shared folder", lambda: storage.put_token(work_dir, token[0]), remedy)
    dist.barrier()
    yield from guarded(
        "shared folder",
        lambda: storage.same_folder(work_dir, token[0], socket.gethostname()),
        remedy,
    )
    dist.barrier()
    if rank == 0:
        with contextlib.suppress(OSError):
            (work_dir / storage.TOKEN_FILE).unlink()


if __name__ == "__main__":
    run_guarded(main)
