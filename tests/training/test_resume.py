"""Resuming is exact: bitwise in the same layout, to rounding in another."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_gmai.config import LoraConfig, ParallelConfig
from megatron_gmai.convert.safe_metadata import CheckedReader
from megatron_gmai.dry_run.save import rank_share
from megatron_gmai.training.checkpoint import open_checkpoint
from tests.parallel.cases import STEPS, Case, Processes
from tests.parallel.world import run_world
from tests.training.resuming import SAVED_AFTER, Job, run_job, run_jobs

TP2 = ParallelConfig(tensor_model_parallel_size=2)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
ONE = ParallelConfig()
ZERO = ParallelConfig(use_distributed_optimizer=True)
# The gather of updated parameters is still under way when a step ends: saving has to finish it.
OVERLAP = ParallelConfig(
    use_distributed_optimizer=True,
    overlap_grad_reduce=True,
    overlap_param_gather=True,
    ddp_bucket_size=4000,
)
VPP2 = ParallelConfig(
    pipeline_model_parallel_size=2,
    num_virtual_stages_per_pipeline_rank=2,
    use_distributed_optimizer=True,
)
CP2 = ParallelConfig(context_parallel_size=2, use_distributed_optimizer=True)
# Copies of the tower on both pipeline ranks, one of which writes; or a part of its state on each.
AHEAD = dataclasses.replace(PP2, vision_phase="all-ranks")
AHEAD_OVERLAP = dataclasses.replace(
    OVERLAP, pipeline_model_parallel_size=2, vision_phase="all-ranks"
)
LORA = LoraConfig(llm_use_lora=True, lora_rank=4)
VIT_LORA = LoraConfig(vit_use_lora=True, lora_rank=4)
DROPOUT = LoraConfig(llm_use_lora=True, lora_rank=4, lora_dropout=0.3)
ALL = ParallelConfig(
    tensor_model_parallel_size=2,
    pipeline_model_parallel_size=2,
    sequence_parallel=True,
    use_distributed_optimizer=True,
)

SAVED = [
    Job("tp2-phase1", Case("tp2", TP2, phase=1), save_to="from-tp2-phase1"),
    Job("tp2-phase3", Case("tp2", TP2, phase=3), save_to="from-tp2-phase3"),
    Job("zero-phase3", Case("zero", ZERO, phase=3), save_to="from-zero-phase3"),
    Job("tp2-bf16", Case("tp2", TP2, dtype="bf16"), save_to="from-tp2-bf16"),
    Job("overlap-phase3", Case("overlap", OVERLAP, phase=3), save_to="from-overlap-phase3"),
    Job("vpp2-phase3", Case("vpp2", VPP2, phase=3), save_to="from-vpp2-phase3"),
    Job("lora-phase3", Case("lora", TP2, lora=LORA), save_to="from-lora-phase3"),
    Job("zero-bf16", Case("zero", ZERO, dtype="bf16"), save_to="from-zero-bf16"),
    Job("ahead-phase2", Case("ahead", AHEAD, phase=2), save_to="from-ahead-phase2"),
    Job("ahead-overlap", Case("ahead", AHEAD_OVERLAP), save_to="from-ahead-overlap"),
    Job("dropout-zero", Case("dropout", ZERO, lora=DROPOUT), save_to="from-dropout-zero"),
    Job("vit-lora-zero", Case("vit-lora", ZERO, lora=VIT_LORA), save_to="from-vit-lora-zero"),
]
SAME = [
    Job(f"same-{job.name}", job.case, load_from=str(job.save_to)) for job in SAVED
]  # fmt: skip
OTHER = {
    1: [
        Job("one-from-tp2-phase1", Case("one", ONE, phase=1), load_from="from-tp2-phase1"),
        Job("one-from-tp2-phase3", Case("one", ONE, phase=3), load_from="from-tp2-phase3"),
        Job("one-from-zero-phase3", Case("one", ONE, phase=3), load_from="from-zero-phase3"),
        Job("one-from-ahead-phase2", Case("one", ONE, phase=2), load_from="from-ahead-phase2"),
        Job("one-from-ahead-overlap", Case("one", ONE), load_from="from-ahead-overlap"),
    ],
    2: [
        Job("zero-from-tp2-phase1", Case("zero", ZERO, phase=1), load_from="from-tp2-phase1"),
        Job("zero-from-tp2-phase3", Case("zero", ZERO, phase=3), load_from="from-tp2-phase3"),
        Job("pp2-from-tp2-phase1", Case("pp2", PP2, phase=1), load_from="from-tp2-phase1"),
        Job("pp2-from-zero-phase3", Case("pp2", PP2, phase=3), load_from="from-zero-phase3"),
        Job("vpp2-from-lora", Case("v", VPP2, lora=LORA), load_from="from-lora-phase3"),
        Job("ahead-from-vit-lora", Case("a", AHEAD, lora=VIT_LORA), load_from="from-vit-lora-zero"),
        Job("cp2-from-vpp2-phase3", Case("cp2", CP2, phase=3), load_from="from-vpp2-phase3"),
        Job("vpp2-from-overlap-phase3", Case("v", VPP2, phase=3), load_from="from-overlap-phase3"),
        Job("tp2-from-zero-phase3", Case("tp2", TP2, phase=3), load_from="from-zero-phase3"),
    ],
    4: [
        Job("all-from-tp2-phase1", Case("all", ALL, phase=1), load_from="from-tp2-phase1"),
        Job("all-from-tp2-phase3", Case("all", ALL, phase=3), load_from="from-tp2-phase3"),
        Job("ahead-from-zero-phase3", Case("a", AHEAD_OVERLAP), load_from="from-zero-phase3"),
        Job("all-from-zero-phase3", Case("all", ALL, phase=3), load_from="from-zero-phase3"),
    ],
}
Rows = dict[int, list[float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all jobs have run."""
    folder = tmp_path_factory.mktemp("resume")
    # The world of two also tries a full disk, which concerns all ranks together.
    run_world(2, run_jobs, SAVED + SAME + OTHER[2], folder, True)
    run_world(4, run_jobs, OTHER[4], folder)
    world = Processes()
    for job in OTHER[1]:
        (folder / f"{job.name}.json").write_text(json.dumps(run_job(job, world, folder)))
    world.close()
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> Callable[[str], Rows]:
    """What a job gave, by its name: [loss, gradient norm] of each iteration."""

    def of_job(name: str) -> Rows:
        text = (folder / f"{name}.json").read_text()
        return {int(iteration): row for iteration, row in json.loads(text).items()}

    return of_job


@pytest.mark.parametrize("job", SAVED, ids=lambda job: job.name)
def test_the_same_layout_continues_bitwise(job: Job, rows: Callable[[str], Rows]) -> None:
    uninterrupted, resumed = rows(job.name), rows(f"same-{job.name}")
    assert resumed == {i: uninterrupted[i] for i in range(SAVED_AFTER, STEPS)}


@pytest.mark.parametrize("job", SAVED, ids=lambda job: job.name)
def test_a_dry_run_counts_the_bytes_that_each_rank_writes(job: Job, folder: Path) -> None:
    """In the file of each rank of the saved checkpoint, to the byte."""
    run = dataclasses.replace(job.case.config.run, dtype=job.case.dtype)
    config = dataclasses.replace(job.case.config, run=run)
    found = box_sizes(open_checkpoint(folder / str(job.save_to)).path)
    for rank in (0, 1):
        share, sizes = rank_share(config, rank, 2, kind="cpu"), found[f"__{rank}_0.distcp"]
        assert (share.bytes, share.boxes, share.largest) == (sum(sizes), len(sizes), max(sizes))


def box_sizes(checkpoint: Path) -> dict[str, list[int]]:
    """Bytes of the tensors in each file."""
    metadata = CheckedReader(checkpoint).read_metadata()
    sizes: dict[str, list[int]] = {}
    for index, stored in metadata.storage_data.items():
        tensor = metadata.state_dict_metadata[index.fqn]
        assert isinstance(tensor, TensorStorageMetadata)
        (box,) = (chunk for chunk in tensor.chunks if chunk.offsets == index.offset)
        size = math.prod(box.sizes) * tensor.properties.dtype.itemsize
        sizes.setdefault(stored.relative_path, []).append(size)
    return sizes


@pytest.mark.parametrize(
    "job", [job for size in OTHER for job in OTHER[size]], ids=lambda j: j.name
)
def test_another_layout_continues_to_rounding(job: Job, rows: Callable[[str], Rows]) -> None:
    uninterrupted = rows(str(job.load_from).removeprefix("from-"))
    resumed = rows(job.name)
    assert list(resumed) == list(range(SAVED_AFTER, STEPS))
    for iteration, row in resumed.items():
        assert row == pytest.approx(uninterrupted[iteration], rel=1e-5)
