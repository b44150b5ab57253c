"""`tools/dry_run.py`, and `--dry-run` of the entry script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.dry_run import main

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--preset", "gmai-vl-tiny", "--pp", "2", "--pipeline-layout", "auto"]


def test_it_prints_and_writes_what_each_stage_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dry.json"
    assert main([*FLAGS, "--world-size", "4", "--json", str(file)]) == 0
    printed, reports = capsys.readouterr().out, json.loads(file.read_text())
    assert "--pipeline-layout auto ->" in printed and "pipeline stage 1" in printed
    assert [report["rank"] for report in reports] == [0, 2]
    assert all(report["peak_bytes"] > report["static_bytes"] for report in reports)
    assert "a checkpoint: 0.0" in printed
    assert all(report["checkpoint_bytes"] > 0 for report in reports)
    assert all(report["collectives"] and report["waits"] for report in reports)


def test_it_counts_what_every_rank_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, flags = tmp_path / "save.json", [*FLAGS, "--world-size", "4", "--count-save"]
    assert main([*flags, "--json", str(file)]) == 0
    shares = json.loads(file.read_text())
    assert [share["rank"] for share in shares] == [0, 1, 2, 3]
    assert all(share["largest"] < share["bytes"] == share["host_async"] for share in shares)
    for a, b in (shares[:2], shares[2:]):  # of a pipeline stage: both hold the same
        assert abs(a["bytes"] - b["bytes"]) <= max(a["largest"], b["largest"])
    assert "a checkpoint, 4 of 4 ranks: 0." in capsys.readouterr().out
    assert main([*flags, "--json", str(file), "--checkpoint-drop-optimizer"]) == 0
    weights = json.loads(file.read_text())
    # bf16 weights alone, without their fp32 masters and Adam's two moments.
    both = [sum(share["bytes"] for share in found) for found in (weights, shares)]
    assert both[0] == pytest.approx(both[1] * 2 / 14, rel=0.02)


@pytest.mark.parametrize(
    "wrong", [["--world-size", "3"], ["--world-size", "4", "--ranks", "9"]], ids=str
)
def test_a_layout_or_rank_that_cannot_be_is_told(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FLAGS, *wrong]) == 2
    assert "dry_run:" in capsys.readouterr().err


def test_the_entry_script_runs_dry_without_data() -> None:
    command = [sys.executable, "pretrain_gmai_vl.py", "--preset", "gmai-vl-tiny", "--dry-run", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "rank 0, pipeline stage 0" in done.stdout
