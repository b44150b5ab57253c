"""Runs that are saved, resumed and broken inside a world of processes."""

import json
import resource
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_gmai.training.checkpoint import (
    CheckpointError,
    Position,
    load_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from megatron_gmai.training.folders import check_shared
from megatron_gmai.training.optimizer import finish_param_gather
from megatron_gmai.training.optimizer_state import steps_taken
from tests.parallel.batches import PACKS
from tests.parallel.cases import STEPS, Case, Processes, Trainer

SAVED_AFTER = 2  # steps of STEPS


@dataclass(frozen=True)
class Job:
    """A run of one layout, from the start or from a checkpoint."""

    name: str
    case: Case
    save_to: str | None = None  # after SAVED_AFTER steps
    load_from: str | None = None


def run_jobs(jobs: list[Job], folder: Path, then_break: bool = False) -> None:
    """Run the jobs in this world; losses and norms by iteration go to `folder/NAME.json`."""
    processes = Processes()
    for job in jobs:
        rows = run_job(job, processes, folder)
        if dist.get_rank() == 0:
            (folder / f"{job.name}.json").write_text(json.dumps(rows))
    if then_break:
        a_full_disk_is_told_and_leaves_nothing(processes, folder / "full")
        folders_that_are_not_shared_are_told(folder / "shared", dist.get_rank())
    dist.barrier()


def run_job(job: Job, processes: Processes, folder: Path) -> dict[int, list[float]]:
    """[loss, gradient norm] by iteration."""
    trainer, first, rows = Trainer(job.case, processes), 0, {}
    if job.load_from is not None:
        checkpoint = open_checkpoint(folder / job.load_from)
        load_checkpoint(checkpoint, trainer.chunks, trainer.optimizer)
        first = checkpoint.position.iteration
    for iteration in range(first, STEPS):
        result = trainer.step(iteration)
        rows[iteration] = [result.loss, result.grad_norm]
        if job.save_to is not None and iteration + 1 == SAVED_AFTER:
            save(trainer, folder / job.save_to, SAVED_AFTER)
    trainer.close()
    return rows


def save(trainer: Trainer, folder: Path, iteration: int, with_optimizer: bool = True) -> Path:
    position = Position(
        iteration, iteration * PACKS, steps_taken(trainer.optimizer, trainer.world.device)
    )
    optimizer = trainer.optimizer if with_optimizer else None
    finish_param_gather(trainer.wrapped)
    return save_checkpoint(folder, position, trainer.chunks, optimizer, trainer.config)


def a_full_disk_is_told_and_leaves_nothing(processes: Processes, folder: Path) -> None:
    """Every rank raises the same error, whichever of them could not write, and which file."""
    trainer = Trainer(Case("full"), processes)
    trainer.step(0)
    save(trainer, folder, 1)
    before = contents(folder)
    message = r"could not save .*iter_0000002: rank \d: .*\n.*earlier checkpoints in .* untouched"

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # bytes a file
    with pytest.raises(CheckpointError, match=message) as raised:
        save(trainer, folder, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Traceback" not in str(raised.value)
    assert contents(folder) == before

    full = OSError(28, "No space left on device")
    with (
        mock.patch("megatron_gmai.training.checkpoint.write_manifest", side_effect=full),
        pytest.raises(CheckpointError, match="rank 0: .*No space left on device"),
    ):
        save(trainer, folder, 2)
    assert contents(folder) == before

    save(trainer, folder, 2)
    assert open_checkpoint(folder).position.iteration == 2


def folders_that_are_not_shared_are_told(folder: Path, rank: int) -> None:
    """By every rank, and nothing stays."""
    own = folder / f"of-node-{rank}"
    own.mkdir(parents=True)
    check_shared(folder, None)
    with pytest.raises(ValueError, match=r"rank.* 1.* cannot see what rank 0 \("):
        check_shared(own, None)
    with pytest.raises(ValueError, match="would resume from iter_1, rank 0 .* from iter_0"):
        check_shared(folder, folder / f"iter_{min(rank, 1)}")
    assert all(size == -1 for size in contents(folder).values())


def contents(folder: Path) -> dict[str, int]:
    """Size of each file below a folder, the same for all ranks."""
    dist.barrier()
    found = {
        str(path.relative_to(folder)): path.stat().st_size if path.is_file() else -1
        for path in sorted(folder.rglob("*"))
    }
    dist.barrier()
    return found
