"""The drill in short: a run with few faults, some of which lose data, beside one without."""

import json
import os
from pathlib import Path

import pytest

from benchmarks.drill.__main__ import main
from benchmarks.drill.faults import KINDS, PHASES, attempts, schedule
from benchmarks.drill.hosts import can_make
from benchmarks.drill.plant import share_cores
from megatron_gmai.runtime.device import threads_per_process


def test_a_broken_run_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    output = tmp_path / "out"
    status = main(["--runs", "lossy", "--steps", "20", "--share", "0.1", "--output", str(output)])
    written = json.loads((output / "drill.json").read_text())
    assert status == 0, written["figures"]
    kinds = [row["kind"] for row in written["faults"]]
    expected = ["damaged sample"] * 3 + ["full"] * can_make() + ["kill", "nan"]
    assert sorted(kinds) == expected
    assert all(row["struck"] for row in written["faults"])
    (kill,) = (row for row in written["faults"] if row["kind"] == "kill")
    assert 0 <= kill["lost"] <= 10 and kill["seconds"] > 0
    assert "<h2>Faults</h2>" in (output / "report.html").read_text()


def test_a_schedule_is_seeded_and_visits_every_phase_and_rank() -> None:
    counts = {kind: 12 for kind in KINDS}
    faults = schedule(counts, steps=200, interval=5, ranks=2, seed=1)
    assert faults == schedule(counts, steps=200, interval=5, ranks=2, seed=1)
    assert faults != schedule(counts, steps=200, interval=5, ranks=2, seed=2)
    assert len(faults) == sum(counts.values()) and max(fault.step for fault in faults) <= 195
    killed = [fault for fault in faults if fault.kind == "kill"]
    assert {fault.phase for fault in killed} == set(PHASES)
    assert {fault.rank for fault in killed} == {0, 1}
    parts = attempts(faults)
    assert [fault for part in parts for fault in part] == faults
    assert all(fault.ends == (fault is part[-1]) for part in parts[:-1] for fault in part)


def test_a_rank_on_a_host_of_its_own_has_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    for of_torchrun in ("1", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", of_torchrun)
        share_cores(2)
        assert threads_per_process() == 4
