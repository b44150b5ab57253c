"""A dry run counts what a run with real tensors holds, computes and sends: exactly."""

from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_gmai.dry_run.run import dry_run
from tests.dry_run.real import IMAGES, compared, count_cases
from tests.parallel.cases import Case
from tests.parallel.test_parity import CASES
from tests.parallel.world import run_world

NAMES = {
    2: (
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
    ),
    4: ("tp2-pp2-sp-zero-phase3", "vpp2-tp2-all-phase3", "tp2-cp2-sp-zero-phase2"),
}
CHOSEN = {size: [case for case in CASES[size] if case.name in NAMES[size]] for size in NAMES}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("real")

    @cache
    def start(size: int) -> Path:
        run_world(size, count_cases, CHOSEN[size], folder)
        return folder

    return start


@pytest.mark.parametrize(
    ("size", "case"),
    [pytest.param(size, case, id=case.name) for size in CHOSEN for case in CHOSEN[size]],
)
def test_a_dry_run_counts_what_a_real_step_does(size: int, case: Case, counted) -> None:
    folder = counted(size)
    for rank in (0, size - 1):
        real = torch.load(folder / f"{case.name}-{rank}.pt", weights_only=False)
        dry = compared(dry_run(case.config, rank, size, IMAGES, kind="cpu"))
        for name, value in real.items():
            assert dry[name] == value, name
