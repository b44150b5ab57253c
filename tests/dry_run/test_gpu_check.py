"""The checks for GPU machines, run on the CPU with small sizes: they measure, and they can fail."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_gmai.gpu_check.finding import Finding, at_most
from megatron_gmai.gpu_check.memory import dry_peak, real_peak
from megatron_gmai.gpu_check.page import render_page, shown, verdict
from megatron_gmai.gpu_check.parity import CASES, Steps, compare, run_cases, small
from megatron_gmai.gpu_check.speed import attention_times, largest, training_speed
from megatron_gmai.runtime.groups import destroy_groups
from megatron_gmai.runtime.processes import in_processes
from tools.gpu_check import guarded, report

pytestmark = pytest.mark.worlds
SMALL = dataclasses.replace(small(), run=dataclasses.replace(small().run, dtype="fp32"))


def everything() -> dict[str, Any]:
    """All checks one after the other in one process of the CPU, with one thread."""
    os.environ["LOCAL_WORLD_SIZE"] = "64"
    found: dict[str, Any] = {"dry": dry_peak(SMALL, 2, "cpu")}
    chosen = tuple(case for case in CASES if case.name in ("phase 3", "recomputed"))
    checks: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("fp32", lambda: run_cases(chosen, "cpu", "fp32")),
        ("bf16", lambda: run_cases(chosen[:1], "cpu", "bf16")),
        ("real", lambda: real_peak(SMALL, 2, "cpu")),
        ("attention", lambda: attention_times(SMALL, "cpu", 4)),
        ("speed", lambda: training_speed(SMALL, "cpu", 2)),
    )
    for name, check in checks:
        found[name] = check()
        destroy_groups()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], dict[str, Any]]:
    return cache(lambda: in_processes(1, 300, everything))


def test_recomputation_gives_the_same_steps(found: Callable[[], dict[str, Any]]) -> None:
    plain, recomputed = found()["fp32"]
    assert all(f.holds for f in compare("recomputed", "fp32", recomputed, plain))


def test_bf16_is_within_its_bar_and_not_within_that_of_fp32(
    found: Callable[[], dict[str, Any]],
) -> None:
    plain, rounded = found()["fp32"][0], found()["bf16"][0]
    assert all(f.holds for f in compare("phase 3", "bf16", rounded, plain))
    assert not all(f.holds for f in compare("phase 3", "fp32", rounded, plain))


def test_a_dry_run_knows_the_peak(found: Callable[[], dict[str, Any]]) -> None:
    counted, allocated = found()["real"]
    assert allocated is None
    assert found()["dry"] == pytest.approx(counted, rel=0.05)


def test_speed_is_measured_where_the_peak_is_not_known(
    found: Callable[[], dict[str, Any]],
) -> None:
    assert [f.name.split(": ")[1] for f in found()["speed"]] == ["tokens", "step", "model FLOPs"]
    assert [f.name.split(": ")[1] for f in found()["attention"]] == ["sdpa"]
    assert all(f.value > 0 for f in found()["speed"] + found()["attention"])


def test_a_check_of_its_own_processes_is_stopped_in_time() -> None:
    with pytest.raises(TimeoutError, match="stopped after 0 s"):
        in_processes(1, 0, everything)


def test_deeper_models_fit_into_more_memory() -> None:
    depths = [next(largest(1, gib)).model.language.num_layers for gib in (70, 130)]
    assert depths == sorted(set(depths)) and depths[0] >= 8


def test_both_files_tell_every_finding_and_a_missed_bar_the_status(tmp_path: Path) -> None:
    def good(output: Path) -> Iterator[Finding]:
        yield at_most("parity", "a <case>", 1e-6, "relative", 1e-4)

    def bad(output: Path) -> Iterator[Finding]:
        yield Finding("speed", "tokens", 123456.0, "a second")
        raise RuntimeError("first line\nCUDA error")

    assert report({"good": good}, {"gpus": "1 x none"}, tmp_path) == 0
    assert report({"good": good, "bad": bad}, {"gpus": "1 x none"}, tmp_path) == 1
    rows = json.loads((tmp_path / "check.json").read_text())["findings"]
    assert [row["holds"] for row in rows] == [True, None, False]
    page = (tmp_path / "check.html").read_text()
    assert "1 of 2 bars missed" in page and "123,456 a second" in page
    assert "a &lt;case&gt;" in page and "CUDA error" in page


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/gpu_check.py", "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2
    (line,) = done.stdout.splitlines()
    assert line.startswith("gpu_check: torch sees no GPU: ")
    assert not (tmp_path / "out").exists()


def test_a_check_that_breaks_is_a_finding_without_a_number(tmp_path: Path) -> None:
    def broken(output: Path) -> Iterator[Finding]:
        raise ValueError

    (row,) = guarded("x", broken, tmp_path)
    assert shown(row) == "–" and row.holds is False
    assert verdict([row]) == "1 of 1 bars missed"
    assert "<td>–<td>runs" in render_page([row], {}, 1.0)


def test_the_comparison_tells_the_worst_step() -> None:
    expected = Steps([2.0, 4.0], [1.0, 1.0])
    loss, norm = compare("x", "fp32", Steps([2.0, 4.4], [1.0, 1.0]), expected)
    assert loss.value == pytest.approx(0.1) and not loss.holds
    assert norm.value == 0 and norm.holds
