"""What can go wrong in a drill, and the seeded schedule of it.

A fault strikes one rank at the first occurrence of its phase from its step on. Each attempt of a
run gets the faults up to the next one that ends it.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Phases of a rank's life in which a fault can strike; those of saving come once an interval.
STEP_PHASES = ("between", "load", "forward", "backward", "reduce", "update")
SAVE_PHASES = ("write", "checksum", "manifest", "tidy")
FIRST_RANK_PHASES = ("manifest", "tidy")  # rank 0 does these alone
PHASES = ("start", *STEP_PHASES, *SAVE_PHASES)

# kind -> (ends the attempt, loses data)
KINDS = {
    "kill": (True, False),  # kill -9
    "terminate": (True, False),  # SIGTERM, as before a time limit
    "stop": (True, False),  # SIGSTOP: the watchdog has to notice
    "cut": (True, False),  # two hosts lose each other during a collective
    "loader": (True, False),  # kill -9 of a loader process
    "truncate": (True, False),  # kill -9, then the newest checkpoint loses half of a file
    "flip": (True, False),  # kill -9, then a bit of the newest checkpoint changes
    "full": (False, False),  # no space is left on the disk, for a while
    "nan": (False, True),  # the loss of one rank is not a number
}
NEED_ROOT = ("cut", "full")


@dataclass(frozen=True)
class Fault:
    """One fault of a schedule."""

    kind: str
    step: int
    rank: int
    phase: str

    @property
    def ends(self) -> bool:
        return KINDS[self.kind][0]

    @property
    def loses_data(self) -> bool:
        return KINDS[self.kind][1]

    def __str__(self) -> str:
        return f"{self.kind} of rank {self.rank} in step {self.step} ({self.phase})"


def schedule(
    counts: dict[str, int], steps: int, interval: int, ranks: int, seed: int
) -> list[Fault]:
    """So many faults of each kind, in random order, spread evenly over the steps.

    Kills walk through all phases and ranks. The last interval stays free of faults.
    """
    draw = random.Random(seed)
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    draw.shuffle(kinds)
    phases = _turns(PHASES, draw)
    stopped = _turns(("forward", "backward", "update", "write"), draw)
    first, last = 2, steps - interval
    faults = []
    for number, kind in enumerate(kinds):
        step = first + (last - first) * number // max(1, len(kinds) - 1)
        phase = next(phases) if kind == "kill" else "reduce" if kind == "cut" else "between"
        if kind == "stop":
            phase = next(stopped)
        if phase in SAVE_PHASES:
            step = -(-step // interval) * interval
        rank = 0 if phase in FIRST_RANK_PHASES else draw.randrange(ranks)
        faults.append(Fault(kind, step, rank, phase))
    return sorted(faults, key=lambda fault: fault.step)


def _turns(phases: Sequence[str], draw: random.Random) -> Iterator[str]:
    """All phases in random order, again and again."""
    while True:
        yield from draw.sample(phases, len(phases))


def attempts(faults: Sequence[Fault]) -> list[list[Fault]]:
    """The faults of each attempt; the last one runs to the end."""
    found: list[list[Fault]] = [[]]
    for fault in faults:
        found[-1].append(fault)
        if fault.ends:
            found.append([])
    return found
