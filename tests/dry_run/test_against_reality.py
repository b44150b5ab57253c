"""A dry run counts what a run with real tensors holds, computes and sends: exactly."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_gmai.dry_run.absent import world_of
from megatron_gmai.dry_run.counter import DeviceCounter
from megatron_gmai.dry_run.run import count_step, dry_run
from megatron_gmai.runtime import cpu
from tests.dry_run.real import IMAGES, as_without_values, compared, count_cases
from tests.parallel.cases import Case
from tests.parallel.test_parity import CASES
from tests.parallel.world import run_world

NAMES = (
    "two-packs-a-micro-batch",
    "tp2-phase3",
    "tp2-sp-recompute",
    "tp2-sp-recompute-attention",
    "pp2-uneven",
    "pp2-phase2",
    "vpp2-recompute",
    "dp2-overlap-zero-phase1",
    "dp2-small-buckets-phase3",
    "dp2-vit-in-turns",
    "cp2-phase1",
    "tp2-pp2-sp-zero-phase3",
    "vpp2-tp2-all-phase3",
    "tp2-cp2-sp-zero-phase2",
    "tp2-pp2-cp2-all",
    "pp2-all-ranks-phase3",
    "vpp2-tp2-all-ranks-phase1",
    "vit-lora-dp2-in-turns",
)
CHOSEN = [(size, case) for size in CASES for case in CASES[size] if case.name in NAMES]
IN_GLOO_WORLDS = (
    "tp2-sp-recompute",
    "pp2-phase2",
    "dp2-small-buckets-phase3",
    "cp2-phase1",
    "pp2-all-ranks-phase3",
)
GLOO = [case for case in CASES[2] if case.name in IN_GLOO_WORLDS]
# One-number tensors: gloo's threads let go of what was sent a moment later, and a rank learns from
# the others that they have optimizers of which it holds no parameter.
NUMBERS = 16


@pytest.mark.parametrize(
    ("size", "case"), [pytest.param(size, case, id=case.name) for size, case in CHOSEN]
)
def test_a_dry_run_counts_the_bytes_of_real_tensors(size: int, case: Case) -> None:
    for rank in sorted({0, size - 1}):
        counter = DeviceCounter(cpu.CPU, fake=None)
        synchronize = counter.note_synchronize
        with (
            world_of(case.config, rank, size, "cpu", synchronize) as world,
            counter,
            as_without_values(),
        ):
            real = count_step(case.config, world, counter, IMAGES)
        dry = dry_run(case.config, rank, size, IMAGES, kind="cpu")
        assert compared(dry) == compared(real)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    @cache
    def start() -> Path:
        folder = tmp_path_factory.mktemp("real")
        run_world(2, count_cases, GLOO, folder)
        return folder

    return start


@pytest.mark.parametrize("case", GLOO, ids=lambda case: case.name)
def test_a_dry_run_counts_what_processes_that_talk_to_each_other_hold(
    case: Case, counted: Callable[[], Path]
) -> None:
    for rank in (0, 1):
        real = torch.load(counted() / f"{case.name}-{rank}.pt", weights_only=False)
        dry = compared(dry_run(case.config, rank, 2, IMAGES, kind="cpu"))
        for part in ("static", "peak"):
            assert dry[part] == pytest.approx(real[part], abs=NUMBERS, rel=0), part
        assert dry["flops"] == real["flops"]
        of_model = {name: n for name, n in real["collectives"].items() if n["bytes"] > 1000}
        assert {name: dry["collectives"][name] for name in of_model} == of_model
