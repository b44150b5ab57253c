"""A loss or gradient that is not finite changes no weight on any rank and is accounted for."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_gmai.config import ParallelConfig
from megatron_gmai.training.skipped import SkippedSteps
from megatron_gmai.training.step import StepResult, sum_losses
from tests.parallel.batches import global_batch
from tests.parallel.cases import Case, Processes, Trainer, whole_weights
from tests.parallel.world import run_world
from tests.training.command import STEPS, finish, losses, start, trained
from tests.training.faulty import faulty
from tests.training.test_schedule_and_metrics import RESULT

CASES = [
    Case("data-parallel"),
    Case("zero", ParallelConfig(use_distributed_optimizer=True)),
    Case("tensor-parallel", ParallelConfig(tensor_model_parallel_size=2)),
    Case("pipeline", ParallelConfig(pipeline_model_parallel_size=2)),
    Case("zero-bf16", ParallelConfig(use_distributed_optimizer=True), dtype="bf16"),
]
Sums = tuple[Tensor, Tensor, Tensor]


def spoil_the_loss(losses: Tensor, labels: Tensor) -> Sums:
    """NaN in the loss and in every gradient of the last data-parallel rank."""
    if parallel_state.get_data_parallel_rank() == parallel_state.get_data_parallel_world_size() - 1:
        losses = losses * math.nan
    return sum_losses(losses, labels)


def spoil_the_gradient(losses: Tensor, labels: Tensor) -> Sums:
    """Infinite gradients of a finite loss."""
    total, count, told = sum_losses(losses, labels)
    return total + (total - total.detach()) * math.inf, count, told


FAULTS = {"loss": spoil_the_loss, "gradient": spoil_the_gradient}


def spoilt_steps_change_nothing(case: Case, processes: Processes) -> None:
    clean = Trainer(case, processes)
    expected = [clean.step(step) for step in (0, 2, 3)]
    trainer = Trainer(case, processes)
    assert trainer.step(0) == expected[0]
    before, _ = whole_weights(trainer.chunks, trainer.world.groups)
    for fault, spoil in FAULTS.items():
        with mock.patch("megatron_gmai.training.step.sum_losses", spoil):
            result = trainer.step(1)
        assert fault in result.not_finite and not result.updated
        keys = [key for pack in global_batch(1) for key in pack.keys]
        assert sorted(result.keys) == sorted(keys)
        after, drifted = whole_weights(trainer.chunks, trainer.world.groups)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert drifted == []
    # The optimizer's state has not moved either: the next steps are those of a run without them.
    assert [trainer.step(step) for step in (2, 3)] == expected[1:]


def spoil_all(cases: list[Case]) -> None:
    processes = Processes()
    for case in cases:
        spoilt_steps_change_nothing(case, processes)
    dist.barrier()


def test_no_rank_of_any_layout_applies_what_is_not_finite() -> None:
    run_world(2, spoil_all, CASES)


def test_without_clipping_it_is_noticed_too(alone: Processes) -> None:
    spoilt_steps_change_nothing(Case("alone", train=(("max_grad_norm", 0.0),)), alone)


def skipped(number: int) -> StepResult:
    return StepResult(**{**vars(RESULT), "not_finite": "the loss is nan", "keys": (f"s/{number}",)})


def test_only_a_run_of_skipped_steps_stops(tmp_path: Path) -> None:
    steps = SkippedSteps(tmp_path, start=0, most_in_a_row=3)
    for iteration, result in enumerate([skipped(1), skipped(2), RESULT, skipped(4), skipped(5)], 1):
        steps.add(iteration, result, lambda: None)
    assert (steps.total, steps.in_a_row) == (4, 2)
    with pytest.raises(ValueError, match=r"3 steps in a row up to step 6 .* is /x/iter_0000003"):
        steps.add(6, skipped(6), lambda: Path("/x/iter_0000003"))


def test_a_resumed_run_counts_what_lies_before_its_start(tmp_path: Path) -> None:
    steps = SkippedSteps(tmp_path, start=0, most_in_a_row=9)
    for iteration in (2, 4, 6):
        steps.add(iteration, skipped(iteration), lambda: None)
    assert SkippedSteps(tmp_path, start=4, most_in_a_row=9).total == 2
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [2, 4]


NAN_AT = """
import math
from megatron_gmai.training import loop, step
exact, number = step.sum_losses, [0]
learning_rate = loop.learning_rate
def count(*arguments):
    number[0] += 1  # once a step
    return learning_rate(*arguments)
loop.learning_rate = count
step.sum_losses = lambda losses, labels: exact(
    losses * (math.nan if number[0] in {steps} and rank == 1 else 1.0), labels)
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Path]:
    return lambda fault: faulty(tmp_path / "program.py", fault)


def test_a_run_skips_the_step_and_finishes(
    shards: Path, program: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two data-parallel ranks with a sample each a step; one of them has the bad one."""
    work_dir = tmp_path / "work"
    fault = program(NAN_AT.format(steps="(2, 5)"))
    output = trained(shards, work_dir, 2, program=fault)
    assert list(losses(work_dir)) == list(range(1, STEPS + 1))
    lines = [json.loads(line) for line in (work_dir / "skipped.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 5]
    assert all(line["reason"] == "the loss is nan" and line["keys"] for line in lines)
    rows = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert [math.isnan(row["loss"]) for row in rows] == [row["iteration"] in (2, 5) for row in rows]
    assert output.count("step 2 skipped: the loss is nan") == 1


def test_a_run_of_them_stops_with_the_last_good_checkpoint_named(
    shards: Path, program: Callable[[str], Path], tmp_path: Path
) -> None:
    work_dir = tmp_path / "work"
    fault = program(NAN_AT.format(steps="range(4, 99)"))
    process = start(shards, work_dir, 2, "--max-skipped-steps", "2", program=fault)
    output = finish(process)
    assert process.returncode != 0
    assert output.count("error: 2 steps in a row up to step 5") == 1, output
    assert f"The last good checkpoint is {work_dir}/checkpoints/iter_0000003" in output
