#!/usr/bin/env python3
"""Train GMAI-VL: `torchrun --nproc-per-node N pretrain_gmai_vl.py FLAGS`.

One process needs no torchrun: `python pretrain_gmai_vl.py FLAGS`.
`--help` lists the flags. The same command runs on CPU (gloo) and on GPUs (NCCL).
"""

import os
import sys
from pathlib import Path

from megatron_gmai.cli import parse
from megatron_gmai.runtime.quiet import quiet_libraries
from megatron_gmai.training.resilience import run_guarded


def main() -> None:
    config, notes = parse(sys.argv[1:])
    # Imported once the flags are known to be right: `--help` and mistakes answer at once.
    quiet_libraries()
    import torch.distributed as dist

    from megatron_gmai.runtime.device import choose_device
    from megatron_gmai.runtime.groups import build_groups, initialize_distributed, seed_everything
    from megatron_gmai.training.loop import save_config, train
    from megatron_gmai.training.setup import build_run, find_start, with_data, with_sizes
    from megatron_gmai.validation import validate

    first = os.environ.get("RANK", "0") == "0"

    def log(message: str) -> None:
        if first:
            print(message, flush=True)

    for note in notes:
        log(note)
    start = find_start(config, log)
    config = with_sizes(config, start)
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    device = choose_device(config.run.device, config.run.dtype)
    Path(config.run.work_dir).mkdir(parents=True, exist_ok=True)
    initialize_distributed(device, config.run.distributed_timeout_minutes)
    groups = build_groups(config.parallel, config.run.distributed_timeout_minutes)
    seed_everything(config.train.seed)
    config, tokenizer = with_data(config)
    if first:
        save_config(config)
    run = build_run(config, tokenizer, start, device, groups)
    log(f"{run.total_iterations} steps, {dist.get_world_size()} processes on {device.kind}")
    train(run)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_guarded(main)
