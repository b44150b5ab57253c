#!/usr/bin/env python3
"""Train GMAI-VL: `torchrun --nproc-per-node N pretrain_gmai_vl.py FLAGS`.

One process needs no torchrun: `python pretrain_gmai_vl.py FLAGS`.
`--help` lists the flags. The same command runs on CPU (gloo) and on GPUs (NCCL).
"""

import os
import sys

from megatron_gmai.cli import parse
from megatron_gmai.runtime.quiet import quiet_libraries, without_compiler
from megatron_gmai.training.preemption import REQUEUE_STATUS, postpone_stop_signals
from megatron_gmai.training.resilience import run_guarded


def main() -> None:
    config, notes = parse(sys.argv[1:])
    postpone_stop_signals()
    # Imported once the flags are known to be right: `--help` and mistakes answer at once.
    quiet_libraries()
    without_compiler()

    from megatron_gmai.planner.layout import settle_layout
    from megatron_gmai.preflight.first import first_checks
    from megatron_gmai.runtime.groups import note_stop, was_stopped
    from megatron_gmai.runtime.world import close_world, open_world
    from megatron_gmai.training.folders import make_folders, take_folders
    from megatron_gmai.training.loop import train
    from megatron_gmai.training.setup import build_run
    from megatron_gmai.training.start import complete, find_start, mean_images_per_pack, verified
    from megatron_gmai.validation import validate

    first = os.environ.get("RANK", "0") == "0"

    def log(message: str) -> None:
        if first:
            print(message, flush=True)

    for note in notes:
        log(note)
    start = find_start(config, log)
    config = complete(config, start)
    if config.run.dry_run is not None:
        from megatron_gmai.dry_run.report import tell

        print(tell(config, config.run.dry_run), flush=True)
        return
    config, balance = settle_layout(config, mean_images_per_pack(config))
    if balance:
        log(balance)
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    make_folders(config)
    world = open_world(config)
    if was_stopped():
        log("a signal has stopped this run: torchrun's restart does not go on with it")
        sys.exit(REQUEUE_STATUS)
    log(str(world.implementation))
    _lock = take_folders(config, start.resume.path if start.resume else None)
    if first:
        for line in first_checks(config, world.device):
            log(line)
    start = verified(start, config, log, world.storage)
    run = build_run(config, start, world)
    log(f"{run.total_iterations} steps, {world.layout.world_size} processes on {world.device.kind}")
    finished = train(run)
    if not finished:
        note_stop()
    close_world()
    if not finished:
        log("stopped by a signal; --resume continues")
        sys.exit(REQUEUE_STATUS)


if __name__ == "__main__":
    run_guarded(main)
