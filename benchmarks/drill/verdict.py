"""What a drill has shown: figures with their bars, and a row for each fault."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.drill.data import open_packs, samples_of
from benchmarks.drill.faults import Fault
from benchmarks.drill.run import GLOBAL_BATCH, Drill, Ended, read_lines
from benchmarks.kernel_figures import Figure, at_most

SEED = 42  # of the runs: the default of --seed


def fault_rows(drill: Drill, ended: Sequence[Ended]) -> list[dict[str, Any]]:
    """Each fault as it happened: steps that had to be taken again, seconds until the run was back
    where it had been. Faults that end nothing cost neither."""
    journal = read_lines(drill.journal)
    begun = [line for line in journal if "begins" in line]
    rows = []
    for attempt in ended:
        for fault in attempt.faults:
            struck = [line for line in journal if line.get("fault") == asdict(fault)]
            row = {"run": drill.name, **asdict(fault), "struck": bool(struck), "lost": 0}
            row |= {"seconds": 0.0, "noticed": 0.0, "status": attempt.status}
            if fault.kind == "nan":
                steps = [line["iteration"] for line in drill.rows("skipped.jsonl")]
                row["struck"] = fault.step in steps
            elif struck and fault.ends:
                at = struck[0]["time"]
                reached = max((b["begins"] for b in begun if b["time"] <= attempt.ended), default=1)
                later = [b for b in begun if b["time"] > attempt.ended]
                back = [b["time"] for b in later if b["begins"] >= reached]
                if later:
                    row["lost"] = max(0, reached - later[0]["begins"])
                row["seconds"] = round(min(back) - at, 2) if back else None
                row["noticed"] = round(attempt.ended - at, 2)
            rows.append(row)
    return rows


def same_figures(drill: Drill, reference: Drill, ended: Sequence[Ended]) -> list[Figure]:
    """Bitwise comparison with a run that nobody interrupted."""
    weights, losses = drill.weights(), drill.losses()
    expected = reference.losses()
    differing = sum(losses.get(step) != expected[step] for step in expected)
    unequal = sum(value != reference.weights().get(name) for name, value in weights.items())
    unplanned = sum(not attempt.faults and attempt.status != 0 for attempt in ended)
    hung = sum(attempt.status is None for attempt in ended)
    left = [path.name for path in drill.checkpoints.glob(".iter_*")]
    return [
        at_most(f"{drill.name}: steps whose loss or gradient norm differs", differing, "", 0),
        at_most(
            f"{drill.name}: files of the final state that differ",
            unequal if weights else len(reference.weights()),
            "",
            0,
        ),
        at_most(f"{drill.name}: ends that no fault explains", unplanned, "", 0),
        at_most(f"{drill.name}: attempts that did not end by themselves", hung, "", 0),
        at_most(f"{drill.name}: half-written checkpoints left", len(left), "", 0),
    ]


def account_figures(drill: Drill, faults: Sequence[Fault], damaged: Sequence[int]) -> list[Figure]:
    """Whether exactly what was lost is written down: samples by key, steps with their samples."""
    packs = open_packs(drill.shards, SEED)
    location = packs.shards.location
    rejected = {row["key"] for row in drill.rows("rejected.jsonl")}
    wrong = rejected ^ {location(sample) for sample in damaged}
    steps = {fault.step for fault in faults if fault.kind == "nan"}
    found = {row["iteration"]: sorted(row["keys"]) for row in drill.rows("skipped.jsonl")}
    expected = {}
    for step in steps:
        samples = samples_of(packs, (step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH)
        kept = (sample for sample in samples if sample not in damaged)
        expected[step] = sorted(packs.shards.read(sample).key for sample in kept)
    unequal = sum(found.get(step) != expected.get(step) for step in {*found, *expected})
    return [
        at_most(f"{drill.name}: rejected samples too many or too few", len(wrong), "", 0),
        at_most(f"{drill.name}: skipped steps wrongly accounted for", unequal, "", 0),
    ]
