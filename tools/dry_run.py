"""Runs a training step on devices that do not exist, and tells what it takes.

    python tools/dry_run.py --world-size 64 --preset gmai-vl-7b --tp 4 --pp 2 [any training flag]

No GPU is needed and no weight is in memory: the code of a real run builds the model of a rank and
takes a step, of which only shapes are computed. Memory, FLOPs, collectives, launches and waits of
the host are counted for one rank of the first, a middle and the last pipeline stage. `--count-save`
counts what each rank writes in a checkpoint instead, and the host memory that it takes.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from megatron_gmai.cli import parse
from megatron_gmai.runtime.quiet import quiet_libraries


def main(argv: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], epilog="All flags of pretrain_gmai_vl.py too."
    )
    flags.add_argument("--world-size", type=int, required=True, help="processes of the run")
    flags.add_argument("--ranks", help="which to run, as 0,8 (default: one of three stages)")
    flags.add_argument("--images-per-pack", type=int, help="(default: packs full of images)")
    flags.add_argument("--count-save", action="store_true", help="what all ranks save, not a step")
    flags.add_argument("--json", type=Path, help="write the counts here")
    own, rest = flags.parse_known_args(argv)
    try:
        config, notes = parse(rest)
        for note in notes:
            print(note, file=sys.stderr)
        quiet_libraries()
        # torch remarks on each rank that processes which are absent have no hooks.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from megatron_gmai.dry_run import save
        from megatron_gmai.dry_run.report import as_json, as_text, dry_runs, prepared

        config, images, balance = prepared(config, own.world_size, own.images_per_pack)
        if balance:
            print(balance)
        ranks = [int(rank) for rank in own.ranks.split(",")] if own.ranks else None
        if own.count_save:
            shares = save.shares(config, own.world_size, ranks)
            text, rows = save.as_text(shares, own.world_size), [share.as_json() for share in shares]
        else:
            reports = dry_runs(config, own.world_size, images, ranks)
            text, rows = as_text(reports), [as_json(report) for report in reports]
    except ValueError as error:
        print(f"dry_run: {error}", file=sys.stderr)
        return 2
    print(text)
    if own.json:
        own.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
