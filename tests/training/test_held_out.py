"""Validation on held-out packs: the same in every layout, and without a trace in training."""

import gzip
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_gmai.config import LoraConfig, ParallelConfig
from megatron_gmai.training.optimizer import finish_param_gather
from tests.parallel.batches import PACKS
from tests.parallel.cases import Case, Processes, Trainer, share, whole_weights
from tests.parallel.world import run_world
from tests.training.command import finish, kill, losses, start, trained, wait_for_step
from tests.training.faulty import SLOW, faulty

CASES = [
    Case("tensor-parallel", ParallelConfig(tensor_model_parallel_size=2)),
    Case("context-parallel", ParallelConfig(context_parallel_size=2)),
    Case(
        "pipeline",
        ParallelConfig(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2),
    ),
    Case(
        "overlap",
        ParallelConfig(
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            ddp_bucket_size=4000,
        ),
    ),
    Case("recomputing", train=(("selective_recompute", 1.0),)),
    Case("dropout", lora=LoraConfig(True, vit_use_lora=True, lora_rank=4, lora_dropout=0.5)),
]


def evaluated(trainer: Trainer, iteration: int) -> float:
    finish_param_gather(trainer.wrapped)
    micro_batches = PACKS // trainer.world.groups.dp.size()
    batches = share(iteration, 1, trainer.world.groups)
    return trainer._step.evaluate(batches, micro_batches).loss


def an_evaluation_leaves_no_trace(case: Case, processes: Processes) -> None:
    """The loss before a step is the loss that the step reports, and what follows is bitwise the
    same as without."""
    plain = Trainer(case, processes)
    expected = [plain.step(0), plain.step(1)]
    trainer = Trainer(case, processes)
    got = []
    for iteration in (0, 1):
        random = torch.get_rng_state()
        loss = evaluated(trainer, iteration)
        assert torch.equal(random, torch.get_rng_state())
        got.append(trainer.step(iteration))
        if not case.lora.lora_dropout:
            assert loss == pytest.approx(got[-1].loss, rel=1e-6)
    if not case.lora.lora_dropout:  # the trackers of random numbers go on from case to case
        assert got == expected
        finish_param_gather(plain.wrapped)
        finish_param_gather(trainer.wrapped)
        before, _ = whole_weights(plain.chunks, plain.world.groups)
        after, _ = whole_weights(trainer.chunks, trainer.world.groups)
        assert all(torch.equal(after[name], before[name]) for name in before)
    else:
        assert evaluated(trainer, 1) == evaluated(trainer, 1)


def evaluate_all(cases: list[Case]) -> None:
    processes = Processes()
    for case in cases:
        an_evaluation_leaves_no_trace(case, processes)
    dist.barrier()


def test_an_evaluation_leaves_no_trace_in_any_layout() -> None:
    run_world(2, evaluate_all, CASES)


@pytest.fixture(scope="module")
def rows(shards: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What a run, killed and resumed, has written. One without validation trains alike."""
    work = tmp_path_factory.mktemp("valid")
    flags = ("--eval-interval", "2", "--eval-iters", "3")
    validated = ("--valid-shards", str(held_out), *flags)
    program = faulty(work / "program.py", SLOW)
    process = start(shards, work / "a", 2, *validated, program=program)
    wait_for_step(process, work / "a", 5)
    kill(process)
    output = trained(shards, work / "a", 2, *validated, "--resume")
    profile = ("--profile", "--profile-step-start", "2", "--profile-step-end", "4")
    trained(shards, work / "plain", 2, *profile, "--profile-ranks", "1")
    the_profile_and_the_times_are_there(work / "plain")
    assert losses(work / "a") == losses(work / "plain"), output
    return [json.loads(line) for line in (work / "a" / "valid.jsonl").read_text().splitlines()]


def the_profile_and_the_times_are_there(work_dir: Path) -> None:
    (trace,) = (work_dir / "profile").iterdir()
    assert trace.name == "rank1.steps2-3.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert "aten::mm" in names and "gloo:all_reduce" in names
    for line in (work_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        (stage,) = row["stages"]
        assert stage["compute"] > 0 and stage["data"] == row["data_wait_s"] > 0
        assert stage["compute"] + stage["data"] + stage["reduce"] <= row["step_time_s"] * 1.5


def test_every_data_set_has_its_loss_once_at_every_interval(rows: list[dict]) -> None:
    assert [(row["iteration"], row["data_set"]) for row in rows] == [
        (step, name) for step in (2, 4, 6, 8, 10) for name in ("samples", "other")
    ]
    assert all(row["loss"] > 0 and row["supervised_tokens"] > 0 for row in rows)
    samples, other = rows[-2:]
    assert other["samples"] == 3  # all there are
    assert 6 <= samples["samples"] < 24  # those of 3 global batches of 2 packs


def test_another_layout_and_seed_take_the_same_packs(
    rows: list[dict], shards: Path, held_out: Path, tmp_path: Path
) -> None:
    flags = ("--valid-shards", str(held_out), "--eval-interval", "2", "--eval-iters", "3")
    more = ("--train-iters", "2", "--num-workers", "1", "--seed", "7")
    output = trained(shards, tmp_path / "b", 1, *flags, *more)
    lines = (tmp_path / "b" / "valid.jsonl").read_text().splitlines()
    for mine, theirs in zip(map(json.loads, lines), rows[:2], strict=True):
        for name in ("data_set", "samples", "supervised_tokens", "rejected"):
            assert mine[name] == theirs[name], output


def test_the_training_shards_are_not_held_out(shards: Path, tmp_path: Path) -> None:
    output = finish(start(shards, tmp_path, 1, "--valid-shards", str(shards)))
    assert "the run trains on these very shards" in output
