"""The cheap checks of preflight, made by every run in its first second on its first rank."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megatron_gmai.config import Config
from megatron_gmai.preflight import machine, storage
from megatron_gmai.preflight.check import PASS, Check, guarded
from megatron_gmai.runtime.device import Device


def first_checks(config: Config, device: Device) -> Iterator[str]:
    """A line for each check that does not pass. The run goes on: it will tell what it cannot do
    without, and survives the rest."""
    for check in _checks(config, device):
        if check.status != PASS:
            yield f"preflight: {check.status}: {check.name}: {check.found} -> {check.remedy}"


def _checks(config: Config, device: Device) -> Iterator[Check]:
    yield from machine.versions()
    yield from guarded("driver and torch", lambda: machine.driver(device), "mend the driver")
    if config.data.num_workers:
        yield from machine.shared_memory()
    folder = Path(config.run.save or config.run.work_dir)
    size = storage.checkpoint_bytes(config, storage.DTYPES[str(device.dtype)])
    count = storage.checkpoints_kept(config)
    yield from guarded(
        "room for checkpoints", lambda: storage.room(folder, size, count), "give another --save"
    )
    for shards in filter(None, (config.data.shards, config.data.valid_shards)):
        yield from guarded("shards", partial(storage.shard_files, shards), "copy them again")
