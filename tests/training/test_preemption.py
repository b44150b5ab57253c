"""A run that is told to stop saves after the step, says so by its status, and continues exactly."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from megatron_gmai.training.preemption import REQUEUE_STATUS
from tests.training.command import STEPS, finish, losses, start, trained, wait_for_step
from tests.training.faulty import SLOW, faulty


@pytest.fixture(scope="module")
def uninterrupted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run that nobody stopped."""
    work_dir = tmp_path_factory.mktemp("uninterrupted")
    trained(shards, work_dir, 1)
    return work_dir


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_every_process_of_the_run_ends_it_with_a_checkpoint(
    number: signal.Signals, shards: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    program = faulty(tmp_path / "program.py", SLOW)
    process = start(shards, tmp_path, 1, "--num-workers", "1", program=program)
    wait_for_step(process, tmp_path, 1)
    os.killpg(process.pid, number)  # as Slurm does: loader processes get it too
    output = finish(process)
    assert process.returncode == REQUEUE_STATUS, output
    last = max(losses(tmp_path))
    assert last < STEPS
    assert (tmp_path / "checkpoints" / f"iter_{last:07d}" / "manifest.json").is_file()

    process = start(shards, tmp_path, 1, "--num-workers", "1", "--resume")
    output = finish(process)
    assert process.returncode == 0, output
    assert losses(tmp_path) == losses(uninterrupted)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(shards: Path, tmp_path: Path) -> None:
    program = faulty(tmp_path / "program.py", SLOW)
    process = start(shards, tmp_path, 2, "--tp", "2", restarts=1, program=program)
    wait_for_step(process, tmp_path, 1)
    ranks = psutil.Process(process.pid).children()
    second = next(rank for rank in ranks if rank.environ().get("RANK") == "1")
    second.send_signal(signal.SIGUSR1)
    output = finish(process)
    last = max(losses(tmp_path))
    assert last < STEPS, output
    assert f"exitcode  : {REQUEUE_STATUS}" in output
    assert f"saved {tmp_path}/checkpoints/iter_{last:07d}" in output
    assert output.count("stopped by a signal; --resume continues") == 1
    assert output.count("torchrun's restart does not go on") == 1
