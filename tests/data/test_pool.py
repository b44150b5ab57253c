"""Worker processes: none outlives its parent, and one that dies is named with what it was at."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_gmai.data.pool import Report, WorkerDied, run_jobs


def square(job: int, report: Report) -> int:
    report(1, 10 * job)
    return job * job


def fail(job: int, report: Report) -> None:
    raise ValueError(f"job {job} is wrong")


def die_at_the_third_item(job: int, report: Report) -> None:
    for item in range(5):
        report(item, 0)
        if item == 3 and job == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)


def wait_for_ever(folder: str, report: Report) -> None:
    (Path(folder) / f"{os.getpid()}.pid").touch()
    time.sleep(600)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_all_jobs_are_done_and_counted(workers: int) -> None:
    told: list[tuple[int, int]] = []
    jobs = range(7)
    results = dict(run_jobs(square, jobs, workers, lambda items, size: told.append((items, size))))
    assert results == {job: job * job for job in jobs}
    assert told[-1] == (7, 10 * sum(jobs))
    assert told == sorted(told)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_as_it_is(workers: int) -> None:
    with pytest.raises(ValueError, match="job . is wrong"):
        list(run_jobs(fail, range(3), workers))


def test_a_killed_worker_is_named_with_its_job_and_item() -> None:
    with pytest.raises(WorkerDied, match="memory runs out") as error:
        list(run_jobs(die_at_the_third_item, range(3), 2))
    assert (error.value.job, error.value.item) == (1, 3)
    children = [c for c in psutil.Process().children() if c.status() != psutil.STATUS_ZOMBIE]
    assert not [c for c in children if "data.pool" in " ".join(c.cmdline())]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    code = (
        "from megatron_gmai.data.pool import run_jobs; from tests.data.test_pool import *\n"
        f"list(run_jobs(wait_for_ever, [{str(tmp_path)!r}] * 2, 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    for _ in range(600):
        if len(workers := [int(file.stem) for file in tmp_path.glob("*.pid")]) == 2:
            break
        time.sleep(0.05)
    assert len(workers) == 2
    parent.send_signal(how)
    parent.wait(20)
    _, alive = psutil.wait_procs([psutil.Process(p) for p in workers if psutil.pid_exists(p)], 20)
    assert not alive
