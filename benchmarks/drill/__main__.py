"""A drill: runs that are broken on purpose, in seeded places, must end as if nothing had been.

    python -m benchmarks.drill [--steps 200] [--seed 1] [--share 1.0] [--output runs/drill] [FLAGS]

Writes drill.json and report.html. Exits with 1 if a bar is missed. Faults that need root (a full
disk, hosts cut from each other) are left out without it.
"""

import argparse
import contextlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.drill import hosts, verdict
from benchmarks.drill.data import damage, make_shards, open_packs, samples_of
from benchmarks.drill.faults import NEED_ROOT, Fault, attempts, schedule
from benchmarks.drill.page import write_page
from benchmarks.drill.run import GLOBAL_BATCH, INTERVAL, RANKS, Drill
from benchmarks.kernel_figures import Figure, at_least, show, write

LOSSLESS = {"kill": 18, "terminate": 4, "stop": 3, "cut": 2, "loader": 2, "truncate": 3, "flip": 3,
            "full": 2}  # fmt: skip
LOSSY = {"nan": 3, "kill": 2, "full": 1}
DAMAGED = 3  # samples whose stored bytes have changed
DISK = "400m"
FEWEST = 40  # faults of a whole drill
RUNS = ("lossless", "lossy")


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of the faults, at least one each")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS, help="(default: both)")
    parser.add_argument("--output", type=Path, default=Path("runs/drill"))
    flags, more = parser.parse_known_args(argv)
    began = time.monotonic()
    shutil.rmtree(flags.output, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        is_root = hosts.can_make()
        two = stack.enter_context(hosts.TwoHosts()) if is_root else None
        disk = stack.enter_context(hosts.small_disk(scratch / "disk", DISK)) if is_root else scratch
        figures, rows = Sessions(flags, more, scratch, disk, two).all()
    figures.append(at_least("faults", len(rows), "", int(FEWEST * flags.share)))
    figures += costs(rows)
    figures.append(Figure("the whole drill", time.monotonic() - began, "s"))
    show(figures)
    notes = [] if is_root else [f"left out without root: {', '.join(NEED_ROOT)}"]
    write(flags.output / "drill.json", figures, notes, faults=rows)
    write_page(flags.output, rows)
    return int(any(figure.holds is False for figure in figures))


class Sessions:
    """The runs of a drill: with faults that lose nothing, and with such that lose data; each beside
    the same run without interruption."""

    def __init__(
        self,
        flags: argparse.Namespace,
        more: Sequence[str],
        scratch: Path,
        disk: Path,
        two: hosts.TwoHosts | None,
    ) -> None:
        self.flags, self.more, self.scratch, self.disk, self.two = flags, more, scratch, disk, two
        # Each sample is read once, so that one that changes on the disk has no past.
        count = 3 * flags.steps * GLOBAL_BATCH
        self.shards = make_shards(scratch / "data", count, flags.seed)

    def all(self) -> tuple[list[Figure], list[dict[str, Any]]]:
        """Figures, and a row for each fault."""
        figures, rows = [], []
        for name in self.flags.runs:
            more_figures, more_rows = getattr(self, name)()
            figures += more_figures
            rows += more_rows
        return figures, rows

    def lossless(self) -> tuple[list[Figure], list[dict[str, Any]]]:
        faults = self._faults(LOSSLESS, self.flags.seed)
        reference, drill = self._drill("reference"), self._drill("lossless")
        reference.run([[]], most_unplanned=0)
        ended = drill.run(attempts(faults))
        rows = verdict.fault_rows(drill, ended)
        figures = verdict.same_figures(drill, reference, ended)
        self._keep(drill)
        shutil.rmtree(reference.work_dir)
        return figures, rows

    def lossy(self) -> tuple[list[Figure], list[dict[str, Any]]]:
        """The reference has the same damaged samples and NaNs, but runs through."""
        faults = self._faults(LOSSY, self.flags.seed + 1)
        shards = Path(shutil.copytree(self.shards, self.scratch / "damaged"))
        packs = open_packs(shards, verdict.SEED)
        used = samples_of(packs, 0, self.flags.steps * GLOBAL_BATCH)
        damaged = random.Random(self.flags.seed).sample(used, DAMAGED)
        for sample in damaged:
            damage(shards, packs, sample)
        reference, drill = self._drill("lossy-reference", shards), self._drill("lossy", shards)
        lost = [fault for fault in faults if fault.loses_data]
        reference.run([lost], most_unplanned=0)
        ended = drill.run(attempts(faults))
        rows = verdict.fault_rows(drill, ended)
        rows += [
            {"run": "lossy", "kind": "damaged sample", "step": None, "rank": None, "phase": "load",
             "struck": True, "lost": 0, "seconds": 0.0, "noticed": 0.0, "status": 0}
        ] * len(damaged)  # fmt: skip
        figures = verdict.same_figures(drill, reference, ended)
        figures += verdict.account_figures(drill, faults, damaged)
        self._keep(drill)
        return figures, rows

    def _faults(self, counts: dict[str, int], seed: int) -> list[Fault]:
        chosen = {
            kind: max(1, round(count * self.flags.share))
            for kind, count in counts.items()
            if self.two or kind not in NEED_ROOT
        }
        return schedule(chosen, self.flags.steps, INTERVAL, RANKS, seed)

    def _drill(self, name: str, shards: Path | None = None) -> Drill:
        folder = self.flags.output / "logs" / name
        return Drill(
            name, shards or self.shards, folder, self.disk, self.flags.steps, self.flags.seed,
            self.more, self.two,
        )  # fmt: skip

    def _keep(self, drill: Drill) -> None:
        """What the report reads; the checkpoints go with the disk."""
        ignore = shutil.ignore_patterns("checkpoints")
        shutil.copytree(drill.work_dir, self.flags.output / drill.name, ignore=ignore)


def costs(rows: Sequence[dict[str, Any]]) -> list[Figure]:
    """Steps lost and seconds to recover, of the faults that ended an attempt."""
    ended = [row for row in rows if row["noticed"]]
    missed = sum(not row["struck"] for row in rows)
    figures = [Figure("faults that did not strike", missed, "", "<= 0", missed == 0)]
    for kind in dict.fromkeys(row["kind"] for row in ended):
        of_kind = [row for row in ended if row["kind"] == kind]
        lost = sum(row["lost"] for row in of_kind) / len(of_kind)
        seconds = [row["seconds"] for row in of_kind if row["seconds"] is not None]
        noticed = sum(row["noticed"] for row in of_kind) / len(of_kind)
        figures.append(Figure(f"{kind}: mean steps lost", lost, "steps"))
        figures.append(Figure(f"{kind}: mean time until the processes ended", noticed, "s"))
        if seconds:
            mean = sum(seconds) / len(seconds)
            figures.append(Figure(f"{kind}: mean time until back at the same step", mean, "s"))
    return figures


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # disk and hosts are tidied up
    sys.exit(main())
