"""The alarm for a loss that stands out."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_gmai.training.spikes import LossSpikes
from tests.training.test_schedule_and_metrics import RESULT


def watched(losses: list[float], work_dir: Path | None = None) -> list[int]:
    """The places of the losses at which the alarm goes off."""
    spikes, found = LossSpikes(work_dir, start=0), []
    for iteration, loss in enumerate(losses, 1):
        if spikes.is_spike(loss):
            found.append(iteration)
        spikes.add(iteration, replace(RESULT, loss=loss, keys=("a/1",)))
    return found


def test_a_noisy_falling_loss_alarms_nobody() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 2000)
    assert watched([3 * math.exp(-i / 500) + 1 + noise[i] for i in range(2000)]) == []


def test_spikes_are_told_with_their_samples_and_do_not_hide_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = [2 + 0.1 * math.sin(i) for i in range(60)]
    losses[40] = losses[45] = 5.0
    losses[50] = math.nan
    assert watched(losses, tmp_path) == [41, 46]
    lines = [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["keys"]) for line in lines] == [(41, ["a/1"]), (46, ["a/1"])]
    assert capsys.readouterr().out.count("loss spike at step 41: 5.0000 after a median of 2.0") == 1


def test_a_new_level_alarms_until_it_is_the_usual() -> None:
    low = [1 + 0.01 * (i % 5) for i in range(100)]
    found = watched(low + [3 + 0.01 * (i % 5) for i in range(200)])
    assert found[0] == 101 and found[-1] < 160


def test_lines_of_steps_that_are_done_again_go(tmp_path: Path) -> None:
    (tmp_path / "spikes.jsonl").write_text('{"iteration": 3}\n{"iteration": 9}\n')
    LossSpikes(tmp_path, start=5)
    assert (tmp_path / "spikes.jsonl").read_text() == '{"iteration": 3}\n'
