"""The layout does not change the mathematics: every layout gives what one process gives."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from megatron_gmai.config import ParallelConfig
from megatron_gmai.convert.seeded import SeededWeights
from tests.parallel.batches import MODEL, global_batch
from tests.parallel.cases import STEPS, Case, Outcome, World, identify, run_case, run_cases
from tests.parallel.world import run_world

TP2 = ParallelConfig(tensor_model_parallel_size=2)
TP2_SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
DP2 = ParallelConfig()
ZERO = ParallelConfig(use_distributed_optimizer=True)
OVERLAP = ParallelConfig(overlap_grad_reduce=True)
OVERLAP_ZERO = ParallelConfig(
    use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
)
ALL = ParallelConfig(
    tensor_model_parallel_size=2,
    pipeline_model_parallel_size=2,
    sequence_parallel=True,
    use_distributed_optimizer=True,
)
PP2_ZERO = ParallelConfig(
    pipeline_model_parallel_size=2, use_distributed_optimizer=True, overlap_grad_reduce=True
)
STAGES = (1, 2, 3)
ENCODED = sorted(
    number
    for step in range(STEPS)
    for pack in global_batch(step)
    if len(pack.pixel_values)
    for number in identify(pack.pixel_values)
)
Outcomes = Callable[[int], dict[str, Outcome]]

CASES = {
    1: [Case("two-packs-a-micro-batch", micro_batch_size=2)],
    2: [
        *(Case(f"tp2-stage{stage}", TP2, stage) for stage in STAGES),
        *(Case(f"pp2-stage{stage}", PP2, stage) for stage in STAGES),
        *(Case(f"dp2-stage{stage}", DP2, stage) for stage in STAGES),
        Case("tp2-sp", TP2_SP),
        Case("tp2-sp-recompute", TP2_SP, selective_recompute=0.5),
        Case("dp2-zero", ZERO),
        *(Case(f"dp2-overlap-stage{stage}", OVERLAP, stage) for stage in STAGES),
        *(Case(f"dp2-overlap-zero-stage{stage}", OVERLAP_ZERO, stage) for stage in STAGES),
        Case("dp2-two-packs-a-micro-batch", DP2, micro_batch_size=2),
    ],
    4: [
        *(Case(f"tp2-pp2-sp-zero-stage{stage}", ALL, stage) for stage in STAGES),
        *(Case(f"tp2-dp2-sp-stage{stage}", TP2_SP, stage) for stage in STAGES),
        Case("pp2-dp2-zero-overlap", PP2_ZERO),
    ],
}
FAULTS = [
    Case("fault-not-summed", TP2, fault="vision gradients not summed over TP"),
    Case("fault-counted-twice", TP2_SP, fault="vision gradients counted once per TP rank"),
]


@pytest.fixture(scope="module")
def references() -> dict[int, Outcome]:
    """What one process gives in each stage."""
    world = World()
    found = {stage: run_case(Case("reference", stage=stage), world) for stage in STAGES}
    world.close()
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The outcomes of all cases of a world size; the first question starts that world."""
    folder = tmp_path_factory.mktemp("outcomes")
    cases = {1: CASES[1], 2: CASES[2] + FAULTS, 4: CASES[4]}

    @cache
    def started(size: int) -> Exception | None:
        try:
            run_world(size, run_cases, cases[size], folder)
        except ProcessRaisedException as error:
            return error
        return None

    def outcomes_of(size: int) -> dict[str, Outcome]:
        if (error := started(size)) is not None:
            raise error
        return {
            case.name: Outcome(**torch.load(folder / f"{case.name}.pt")) for case in cases[size]
        }

    return outcomes_of


@pytest.mark.parametrize(
    ("size", "case"),
    [pytest.param(size, case, id=case.name) for size in CASES for case in CASES[size]],
)
def test_a_layout_gives_what_one_process_gives(
    size: int, case: Case, outcomes: Outcomes, references: dict[int, Outcome]
) -> None:
    found, expected = outcomes(size)[case.name], references[case.stage]
    assert found.drifted == []
    assert found.encoded == ENCODED  # each image once, whichever rank did it
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.fault)
def test_the_comparison_reveals_a_planted_fault(
    case: Case, outcomes: Outcomes, references: dict[int, Outcome]
) -> None:
    found, expected = outcomes(2)[case.name], references[3]
    assert found.losses[0] == pytest.approx(expected.losses[0], rel=1e-5)  # looks right at first
    assert found.grad_norms[0] != pytest.approx(expected.grad_norms[0], rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_frozen_stays_and_what_trains_moves(
    stage: int, references: dict[int, Outcome]
) -> None:
    start = SeededWeights(MODEL, seed=1)
    moved = {
        name.split(".")[0]
        for name, weight in references[stage].weights.items()
        if not torch.equal(weight, start[name])
    }
    trained = {1: {"projector"}, 2: {"projector", "vision_model"}}
    assert moved == trained.get(stage, {"projector", "vision_model", "language_model"})
