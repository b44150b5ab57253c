"""The launcher: flags are judged before a job waits; the line that it prints is what it does."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.command import ROOT

FOUR_NODES = ("--recipe", "phase1", "--work-dir", "runs/phase1", "--nodes", "4", "--tp", "2")


@pytest.fixture
def start(tmp_path: Path) -> tuple[str, ...]:
    """Flags of start weights and shards that are there."""
    (tmp_path / "tokenizer.model").touch()
    return ("--llava", str(tmp_path), "--dset-cache-dir", str(tmp_path))


def launch(*flags: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"}
    command = [sys.executable, str(ROOT / "tools" / "launch.py"), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")


def test_the_line_names_nodes_layout_recipe_and_the_rest(start: tuple[str, ...]) -> None:
    done = launch(*FOUR_NODES, "--time", "8:00:00", "--sbatch=--partition=big", *start)
    words = shlex.split(done.stdout)
    assert words[0] == "sbatch", done.stderr
    place = words.index("examples/slurm/train.sbatch")
    assert {"--nodes=4", "--gpus-per-node=8", "--time=8:00:00", "--partition=big"} <= set(
        words[:place]
    )
    assert words[place + 1 : place + 3] == ["runs/phase1", "@examples/recipes/phase1.args"]
    assert words[words.index("--tensor-model-parallel-size") + 1] == "2"
    assert "--sequence-parallel" in words
    assert words[-4:] == list(start)
    assert "TP 2 x PP 1 x DP 16, 4 micro-batch(es) of 8 packs a step" in done.stderr


def test_submitting_runs_the_line_that_is_printed(start: tuple[str, ...], tmp_path: Path) -> None:
    program = tmp_path / "sbatch"
    program.write_text('#!/bin/bash\npwd; printf "%s\\n" "$@"\n')
    program.chmod(0o755)
    printed = shlex.split(launch(*FOUR_NODES, *start).stdout)
    submitted = launch(*FOUR_NODES, "--submit", *start, path=str(tmp_path))
    assert submitted.stdout.splitlines() == [str(ROOT), *printed[1:]]


def test_a_later_phase_may_wait_for_checkpoints_that_are_not_there_yet(
    start: tuple[str, ...],
) -> None:
    later = ("--recipe", "phase2", "--work-dir", "runs/phase2", "--load", "runs/absent")
    assert "there is no such folder" in launch(*later, *start[2:]).stderr
    assert "--dependency=afterok:12" in launch(*later, *start[2:], "--after", "12").stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tp", "3"), "does not divide the query groups, 8"),
        (("--nodes", "0"), "--nodes 0: out of range"),
        (("--here", "--after", "12"), "only Slurm waits for a job"),
        (("--after", "12", "--keep-last", "0"), "--keep-last 0: out of range"),
        (("--nodes", "3"), "is no multiple of micro-batch 8 x DP 12"),
        (("--recipe", "phase9"), "there are phase1, phase2, phase3"),
        (("--lrr", "1"), "did you mean --lr?"),
    ],
)
def test_a_mistake_is_told_before_the_job_waits(
    flags: tuple[str, ...], message: str, start: tuple[str, ...]
) -> None:
    done = launch(*FOUR_NODES, *start, *flags)
    assert done.returncode == 2
    assert message in done.stderr and done.stdout == ""


def test_without_slurm_the_remedy_is_told(start: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "launch.py"), *FOUR_NODES, "--submit", *start],
        env=os.environ | {"PATH": "/absent"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "--here" in done.stderr) == (2, True)
