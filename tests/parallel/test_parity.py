"""The layout does not change the mathematics: every layout gives what one process gives."""

import dataclasses
from collections.abc import Callable
from functools import cache

import pytest
import torch

from megatron_gmai.config import LoraConfig, ParallelConfig
from megatron_gmai.convert.seeded import SeededWeights
from tests.parallel.batches import MODEL, global_batch
from tests.parallel.cases import (
    STEPS,
    Case,
    Outcome,
    Processes,
    identify,
    run_case,
    run_cases,
    started_adapters,
)
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
# Many small buckets: a cluster's model has many of any size.
SMALL_BUCKETS = dataclasses.replace(OVERLAP_ZERO, ddp_bucket_size=4000)
TP2_SMALL_BUCKETS = dataclasses.replace(SMALL_BUCKETS, tensor_model_parallel_size=2)
CP2 = ParallelConfig(context_parallel_size=2)
CP2_ALL = dataclasses.replace(SMALL_BUCKETS, context_parallel_size=2)
TP2_CP2 = ParallelConfig(
    tensor_model_parallel_size=2,
    context_parallel_size=2,
    sequence_parallel=True,
    use_distributed_optimizer=True,
)
PP2_UNEVEN = ParallelConfig(pipeline_model_parallel_size=2, pipeline_layout="1,3")
PP2_VIT_ALONE = ParallelConfig(pipeline_model_parallel_size=2, pipeline_layout="0,4")
VPP2 = ParallelConfig(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2)
VPP2_UNEVEN = dataclasses.replace(VPP2, pipeline_layout="0,2,1,1")
VPP2_ALL = dataclasses.replace(
    SMALL_BUCKETS,
    pipeline_model_parallel_size=2,
    num_virtual_stages_per_pipeline_rank=2,
    tensor_model_parallel_size=2,
    sequence_parallel=True,
)
PP2_CP2 = dataclasses.replace(
    SMALL_BUCKETS, pipeline_model_parallel_size=2, context_parallel_size=2
)
PP2_ZERO = ParallelConfig(
    pipeline_model_parallel_size=2, use_distributed_optimizer=True, overlap_grad_reduce=True
)
PP2_AHEAD = dataclasses.replace(PP2, vision_phase="all-ranks")
VPP2_ALL_AHEAD = dataclasses.replace(VPP2_ALL, vision_phase="all-ranks")
EIGHT = ParallelConfig(
    tensor_model_parallel_size=2,
    pipeline_model_parallel_size=2,
    sequence_parallel=True,
    use_distributed_optimizer=True,
    overlap_grad_reduce=True,
    overlap_param_gather=True,
    ddp_bucket_size=4000,
)
EIGHT_AHEAD = dataclasses.replace(EIGHT, vision_phase="all-ranks")
HALF_RECOMPUTED = (("selective_recompute", 0.5),)
ATTENTION_RECOMPUTED = (("recompute_granularity", "selective"),)
UNIFORM = (
    ("recompute_granularity", "full"),
    ("recompute_method", "uniform"),
    ("recompute_num_layers", 1),
)
ONE_IMAGE = (("vit_micro_batch_size", 1),)
LORA = LoraConfig(llm_use_lora=True, lora_rank=4, lora_alpha=8)
VIT_LORA = dataclasses.replace(LORA, llm_use_lora=False, vit_use_lora=True)
BOTH_LORA = dataclasses.replace(LORA, vit_use_lora=True)
PHASES = (1, 2, 3)
IN_BF16 = 5
TIED = 10  # and the phase
ADAPTED = {LORA: 4, VIT_LORA: 6, BOTH_LORA: 7}  # trains everything else in full
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
        *(Case(f"tp2-phase{phase}", TP2, phase) for phase in PHASES),
        *(Case(f"pp2-phase{phase}", PP2, phase) for phase in PHASES),
        *(Case(f"dp2-phase{phase}", DP2, phase) for phase in PHASES),
        Case("tp2-sp", TP2_SP),
        Case("tp2-sp-recompute", TP2_SP, train=HALF_RECOMPUTED),
        Case("tp2-sp-recompute-attention", TP2_SP, train=ATTENTION_RECOMPUTED),
        Case("pp2-recompute-uniform", PP2, train=UNIFORM),
        *(Case(f"tp2-vit-in-turns-phase{phase}", TP2, phase, train=ONE_IMAGE) for phase in PHASES),
        Case("dp2-recompute-vit", SMALL_BUCKETS, train=(("recompute_vit", True),)),
        Case("dp2-vit-in-turns", SMALL_BUCKETS, micro_batch_size=2, train=ONE_IMAGE),
        Case("dp2-zero", ZERO),
        *(Case(f"dp2-overlap-phase{phase}", OVERLAP, phase) for phase in PHASES),
        *(Case(f"dp2-overlap-zero-phase{phase}", OVERLAP_ZERO, phase) for phase in PHASES),
        Case("dp2-two-packs-a-micro-batch", DP2, micro_batch_size=2),
        Case("lora-tp2", TP2, lora=LORA),
        Case("lora-tp2-sp-recompute", TP2_SP, train=HALF_RECOMPUTED, lora=LORA),
        Case("lora-vpp2", VPP2, lora=LORA),
        Case("lora-cp2", CP2, lora=LORA),
        Case("lora-dp2-small-buckets", SMALL_BUCKETS, lora=LORA),
        *(Case(f"dp2-small-buckets-phase{phase}", SMALL_BUCKETS, phase) for phase in PHASES),
        *(Case(f"cp2-phase{phase}", CP2, phase) for phase in PHASES),
        Case("cp2-two-packs-a-micro-batch", CP2, micro_batch_size=2),
        Case("pp2-uneven", PP2_UNEVEN),
        Case("pp2-gpu-transfers", PP2, gpu_transfers=True),
        Case("vpp2-gpu-transfers", VPP2, gpu_transfers=True),
        Case("pp2-vit-alone", PP2_VIT_ALONE),
        *(Case(f"vpp2-phase{phase}", VPP2, phase) for phase in PHASES),
        Case("vpp2-uneven", VPP2_UNEVEN),
        Case("vpp2-recompute", VPP2, train=HALF_RECOMPUTED),
        *(Case(f"pp2-all-ranks-phase{phase}", PP2_AHEAD, phase) for phase in PHASES),
        Case("pp2-all-ranks-vit-in-turns", PP2_AHEAD, train=ONE_IMAGE),
        Case("pp2-all-ranks-no-layers", dataclasses.replace(PP2_AHEAD, pipeline_layout="0,4")),
        Case("tp2-all-ranks", dataclasses.replace(TP2, vision_phase="all-ranks")),
        *(Case(f"tied-pp2-phase{phase}", PP2, phase, tied=True) for phase in (2, 3)),
        Case("tied-tp2-sp", TP2_SP, tied=True),
        Case("tied-dp2-small-buckets", SMALL_BUCKETS, tied=True),
        Case("lora-pp2-all-ranks", PP2_AHEAD, lora=LORA),
        Case("vit-lora-tp2", TP2, lora=VIT_LORA),
        Case("vit-lora-dp2-in-turns", SMALL_BUCKETS, train=ONE_IMAGE, lora=VIT_LORA),
        Case("both-lora-pp2-all-ranks", PP2_AHEAD, lora=BOTH_LORA),
    ],
    4: [
        *(Case(f"tp2-pp2-sp-zero-phase{phase}", ALL, phase) for phase in PHASES),
        *(Case(f"tp2-dp2-sp-phase{phase}", TP2_SP, phase) for phase in PHASES),
        Case("pp2-dp2-zero-overlap", PP2_ZERO),
        *(
            Case(f"tp2-dp2-small-buckets-phase{phase}", TP2_SMALL_BUCKETS, phase)
            for phase in PHASES
        ),
        *(Case(f"tp2-cp2-sp-zero-phase{phase}", TP2_CP2, phase) for phase in PHASES),
        Case("cp2-dp2-small-buckets", CP2_ALL),
        Case("lora-tp2-pp2-sp-zero", ALL, lora=LORA),
        Case("lora-vpp2-tp2-sp-zero", VPP2_ALL, lora=LORA),
        Case("both-lora-tp2-pp2-sp-zero", ALL, lora=BOTH_LORA),
        Case("vit-lora-tp2-cp2-sp-zero", TP2_CP2, lora=VIT_LORA),
        Case("vit-lora-vpp2-tp2-all-ranks", VPP2_ALL_AHEAD, lora=VIT_LORA),
        Case("pp2-cp2", PP2_CP2),
        *(Case(f"vpp2-tp2-all-phase{phase}", VPP2_ALL, phase) for phase in PHASES),
        *(Case(f"vpp2-tp2-all-ranks-phase{phase}", VPP2_ALL_AHEAD, phase) for phase in PHASES),
        Case("tied-vpp2-tp2-all", VPP2_ALL, tied=True),
        Case(
            "tied-pp2-dp2-small-buckets",
            dataclasses.replace(SMALL_BUCKETS, pipeline_model_parallel_size=2),
            tied=True,
        ),
        Case("pp2-cp2-all-ranks", dataclasses.replace(PP2_CP2, vision_phase="all-ranks")),
        Case("cp4", dataclasses.replace(CP2, context_parallel_size=4)),
    ],
    8: [
        *(Case(f"tp2-pp2-dp2-all-phase{phase}", EIGHT, phase) for phase in PHASES),
        Case("tp2-pp2-dp2-all-ranks", EIGHT_AHEAD),
        Case("tp2-pp2-cp2-all-ranks", dataclasses.replace(EIGHT_AHEAD, context_parallel_size=2)),
        Case("tp2-pp2-cp2-all", dataclasses.replace(EIGHT, context_parallel_size=2)),
        Case(
            "tp2-vpp2-cp2-all",
            dataclasses.replace(
                EIGHT, context_parallel_size=2, num_virtual_stages_per_pipeline_rank=2
            ),
        ),
    ],
}
FAULTS = [
    Case("fault-not-summed", TP2, fault="vision gradients not summed over TP"),
    Case("fault-counted-twice", TP2_SP, fault="vision gradients counted once per TP rank"),
    Case("fault-not-summed-over-cp", CP2, fault="vision gradients not summed over CP"),
    Case("fault-mean-of-means", DP2, fault="mean of the micro-batches' means"),
    Case("fault-missing", PP2_AHEAD, fault="feature gradients missing on a pipeline rank"),
    Case("fault-applied-twice", PP2_AHEAD, fault="feature gradients applied twice"),
    Case(
        "fault-tied", PP2, fault="gradients of a tied weight not summed over its copies", tied=True
    ),
    Case("fault-copies-in-norm", PP2_AHEAD, fault="copies of the tower counted in the norm"),
]
# The dtype of GPUs: rounding differs between layouts, copies of a weight still may not.
BF16 = [
    Case("bf16-tp2-sp", TP2_SP, dtype="bf16"),
    Case("bf16-dp2-small-buckets", SMALL_BUCKETS, dtype="bf16"),
    Case("bf16-cp2", CP2, dtype="bf16"),
    Case("bf16-pp2", PP2, dtype="bf16"),
]
# Dropout's masks follow the layout, so no other layout says the same.
DROPPED = dataclasses.replace(LORA, lora_dropout=0.4)
VIT_DROPPED = dataclasses.replace(VIT_LORA, lora_dropout=0.4)
DROPOUT = [
    Case("dropout-tp2", TP2, lora=DROPPED),
    Case("dropout-tp2-sp", TP2_SP, lora=DROPPED),
    Case("dropout-tp2-sp-recompute", TP2_SP, train=HALF_RECOMPUTED, lora=DROPPED),
    Case("dropout-vit", TP2, lora=VIT_DROPPED),
    Case("dropout-vit-recompute", TP2, train=(("recompute_vit", True),), lora=VIT_DROPPED),
]
# Wrong from the second step on, or in the loss itself.
LOSS_FAULTS = [
    Case("fault-boundaries", DP2, fault="segment boundaries off by one"),
    Case(
        "fault-stale-weights", SMALL_BUCKETS, fault="the gather of updated weights is not awaited"
    ),
]


@pytest.fixture(scope="module")
def references() -> dict[int, Outcome]:
    """What one process gives in each phase."""
    processes = Processes()
    found = {phase: run_case(Case("reference", phase=phase), processes) for phase in PHASES}
    found[IN_BF16] = run_case(Case("reference", dtype="bf16"), processes)
    for phase in (2, 3):
        found[TIED + phase] = run_case(Case("reference", phase=phase, tied=True), processes)
    for lora, number in ADAPTED.items():
        found[number] = run_case(Case("reference", lora=lora), processes)
    processes.close()
    return found


def reference_of(case: Case) -> int:
    if case.tied:
        return TIED + case.phase
    return ADAPTED.get(dataclasses.replace(case.lora, lora_dropout=0.0), case.phase)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The outcomes of all cases of a world size; the first question starts that world."""
    folder = tmp_path_factory.mktemp("outcomes")
    cases = {
        1: CASES[1],
        2: CASES[2] + FAULTS + LOSS_FAULTS + BF16 + DROPOUT,
        4: CASES[4],
        8: CASES[8],
    }

    @cache
    def started(size: int) -> Exception | None:
        try:
            run_world(size, run_cases, cases[size], folder)
        except RuntimeError as error:
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
    [
        pytest.param(size, case, id=case.name, marks=[pytest.mark.core] if size == 2 else [])
        for size in CASES
        for case in CASES[size]
    ],
)
def test_a_layout_gives_what_one_process_gives(
    size: int, case: Case, outcomes: Outcomes, references: dict[int, Outcome]
) -> None:
    found, expected = outcomes(size)[case.name], references[reference_of(case)]
    assert found.drifted == []
    assert found.encoded == ENCODED  # each image once, whichever rank did it
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("case", BF16, ids=lambda case: case.name)
def test_a_layout_in_bf16_gives_what_one_process_gives_in_bf16(
    case: Case, outcomes: Outcomes, references: dict[int, Outcome]
) -> None:
    found, expected = outcomes(2)[case.name], references[IN_BF16]
    assert found.drifted == []
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-2)


@pytest.mark.parametrize("case", DROPOUT, ids=lambda case: case.name)
def test_dropout_acts_and_leaves_copies_of_adapters_the_same(
    case: Case, outcomes: Outcomes, references: dict[int, Outcome]
) -> None:
    found = outcomes(2)[case.name]
    assert found.drifted == []
    assert found.losses != pytest.approx(references[reference_of(case)].losses, rel=1e-3)


@pytest.mark.parametrize("name", ["dropout-tp2-sp", "dropout-vit"])
def test_recomputation_draws_the_same_masks_again(name: str, outcomes: Outcomes) -> None:
    found = outcomes(2)
    again, kept = found[f"{name}-recompute"], found[name]
    assert again.grad_norms == pytest.approx(kept.grad_norms, rel=1e-5)


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.fault)
def test_the_comparison_reveals_a_planted_fault(
    case: Case, outcomes: Outcomes, references: dict[int, Outcome]
) -> None:
    found, expected = outcomes(2)[case.name], references[reference_of(case)]
    assert found.losses[0] == pytest.approx(expected.losses[0], rel=1e-5)  # looks right at first
    assert found.grad_norms[0] != pytest.approx(expected.grad_norms[0], rel=1e-3)


@pytest.mark.parametrize("case", LOSS_FAULTS, ids=lambda case: case.fault)
def test_the_losses_reveal_a_planted_fault(
    case: Case, outcomes: Outcomes, references: dict[int, Outcome]
) -> None:
    found, expected = outcomes(2)[case.name], references[3]
    assert found.losses != pytest.approx(expected.losses, rel=1e-4)


TRAINED = {
    1: {"projector"},
    2: {"projector", "vision_model"},
    3: {"projector", "vision_model", "language_model"},
    ADAPTED[LORA]: {"projector", "vision_model", "adapters of language_model"},
    ADAPTED[VIT_LORA]: {"projector", "adapters of vision_model", "language_model"},
    ADAPTED[BOTH_LORA]: {"projector", "adapters of vision_model", "adapters of language_model"},
}


@pytest.mark.parametrize("reference", TRAINED)
def test_what_is_frozen_stays_and_what_trains_moves(
    reference: int, references: dict[int, Outcome]
) -> None:
    start = {**SeededWeights(MODEL, seed=1), **started_adapters(BOTH_LORA)}
    moved = {
        f"adapters of {name.split('.')[0]}" if ".lora." in name else name.split(".")[0]
        for name, weight in references[reference].weights.items()
        if not torch.equal(weight, start[name])
    }
    assert moved == TRAINED[reference]
