"""The entry script with faults planted, as the ranks of a drill run it: `plant.py FLAGS`.

`DRILL` in the environment is a JSON object: the faults of this attempt, the journal, the number of
ranks, the interval between checkpoints, and the network link that a cut takes down.
"""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.drill.faults import Fault
from megatron_gmai.runtime.quiet import quiet_libraries
from megatron_gmai.training.preemption import postpone_stop_signals
from megatron_gmai.training.resilience import run_guarded

BLOCKS = (2**20, 2**12)  # bytes that are written at once until none fits


class Planted:
    """The faults of one rank, and what it writes down about itself."""

    def __init__(self, plan: dict[str, Any], rank: int) -> None:
        self.faults = [Fault(**fault) for fault in plan["faults"]]
        self.rank, self.plan, self.step = rank, plan, 0
        self.journal = Path(plan["journal"])
        self.freed_at: float = math.inf

    def strike(self, phase: str) -> None:
        """Let the first fault of this phase happen whose step has come."""
        for fault in self.faults:
            mine = fault.rank == self.rank and fault.phase == phase and fault.kind != "nan"
            if mine and self.step >= fault.step * (phase != "start"):
                self.faults.remove(fault)
                self.note(fault=vars(fault))
                getattr(self, f"_{fault.kind}")()
                return

    def note(self, **line: Any) -> None:
        """Append to the journal, which lies on a disk that is never full."""
        with self.journal.open("a") as file:
            file.write(json.dumps({"time": time.time(), "step": self.step, **line}) + "\n")

    def begin(self, step: int) -> None:
        """A step begins; rank 0 writes it down."""
        self.step = step
        if self.rank == 0:
            self.note(begins=step)
        if step >= self.freed_at:
            self._ballast().unlink()
            self.freed_at = math.inf
        self.strike("between")

    def is_spoilt(self) -> bool:
        """Whether this rank's loss of this step is to be NaN."""
        return any(
            fault.kind == "nan" and (fault.step, fault.rank) == (self.step, self.rank)
            for fault in self.faults
        )

    def _kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    _truncate = _flip = _kill  # the checkpoint is damaged by whoever starts the run again

    def _stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _terminate(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def _cut(self) -> None:
        subprocess.run(["ip", "link", "set", "dev", self.plan["link"], "down"], check=True)

    def _loader(self) -> None:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    def _full(self) -> None:
        """Fill the disk of the work directory, until a checkpoint has failed."""
        with self._ballast().open("wb", buffering=0) as file:
            for size in BLOCKS:
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass
        self.freed_at = self.step + self.plan["interval"] + 1

    def _ballast(self) -> Path:
        return Path(self.plan["disk"]) / "ballast"


def plant(planted: Planted) -> None:
    """Wrap what the phases begin with."""
    from megatron_gmai.data.loading.dataset import PackDataset
    from megatron_gmai.training import checkpoint, loop, saving, step

    for module, name, phase in (
        (PackDataset, "assemble", "load"),
        (step, "forward_step", "forward"),
        (step, "finalize_model_grads", "backward"),
        (step, "reduce_counts", "reduce"),
        (step, "apply_gradients", "update"),
        (checkpoint, "write_pieces", "write"),
        (checkpoint, "checksums_of_all_ranks", "checksum"),
        (checkpoint, "write_manifest", "manifest"),
        (saving, "forget_older", "tidy"),
    ):
        setattr(module, name, _before(getattr(module, name), planted, phase))
    learning_rate, sum_losses = loop.learning_rate, step.sum_losses

    def begin(iteration: int, *rest: Any) -> float:
        planted.begin(iteration)  # asked for once a step, at its beginning
        return learning_rate(iteration, *rest)

    def spoil(losses: Any, labels: Any) -> Any:
        return sum_losses(losses * math.nan if planted.is_spoilt() else losses, labels)

    loop.learning_rate, step.sum_losses = begin, spoil  # type: ignore[assignment]


def _before(exact: Callable[..., Any], planted: Planted, phase: str) -> Callable[..., Any]:
    def wrapper(*arguments: Any, **options: Any) -> Any:
        planted.strike(phase)
        return exact(*arguments, **options)

    return wrapper


def share_cores(ranks: int) -> None:
    """Let a rank compute with as many threads on a host of its own as beside the others: the hosts
    are this machine, and sums over other numbers of threads are rounded differently."""
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)


def main() -> None:
    import pretrain_gmai_vl

    planted = Planted(json.loads(os.environ["DRILL"]), int(os.environ["RANK"]))
    share_cores(planted.plan["ranks"])
    planted.strike("start")
    plant(planted)
    pretrain_gmai_vl.main()


if __name__ == "__main__":
    postpone_stop_signals()
    quiet_libraries()
    run_guarded(main)
