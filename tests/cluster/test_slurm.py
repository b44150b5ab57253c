"""The template on a real Slurm of two nodes: the time limit comes near, the job saves and goes on.

`make test-slurm`; Debian's packages `slurm-wlm` and `munge`, and root, are needed.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import slurm
from tests.training.command import ROOT, losses

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not slurm.installed(), reason="no slurm-wlm and munge, or not root"),
]

# Slurm looks every 30 seconds which jobs come near their limit: the run must last longer than that.
LASTS = 35.0  # seconds of steps
FIRST_TRY = 80  # steps
GOES_ON = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
Losses = dict[int, tuple[float, float]]
FLAGS = (
    *("--preset", "gmai-vl-tiny", "--max-length", "256", "--global-batch-size", "16"),
    *("--micro-batch-size", "8", "--use-distributed-optimizer", "--log-interval", "1"),
    *("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "200000"),
    *("--checkpoint-interval", "-1", "--device", "cpu"),
)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[slurm.Slurm]:
    folder = tmp_path / "slurm"
    folder.mkdir()
    made = slurm.Slurm(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def uninterrupted(cluster: slurm.Slurm, shards: Path, folder: Path) -> tuple[int, Losses]:
    """Losses of a job that is not stopped, and its steps: as many as last long enough here."""
    steps, lasts = FIRST_TRY, 0.0
    while lasts < LASTS:
        steps = max(steps, math.ceil(1.3 * LASTS / lasts * steps)) if lasts else steps
        work_dir, log = folder / f"uninterrupted-{steps}", folder / f"uninterrupted-{steps}.log"
        job = submit(cluster, log, work_dir, "--shards", str(shards), "--train-iters", str(steps))
        wait_for_state(cluster, job, log, "COMPLETED")
        rows = (work_dir / "metrics.jsonl").read_text().splitlines()
        lasts = sum(json.loads(row)["step_time_s"] for row in rows)
    return steps, losses(work_dir)


def submit(cluster: slurm.Slurm, log: Path, work_dir: Path, *flags: str) -> str:
    """Number of the job."""
    settings = {"RDZV_HOST": "127.0.0.1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    words = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=1", "--time=10"]
    words += [f"--output={log}", f"--chdir={ROOT}", str(ROOT / "examples/slurm/train.sbatch")]
    return cluster.run(*words, str(work_dir), *FLAGS, *flags, **settings)


def wait_for_state(cluster: slurm.Slurm, job: str, log: Path, state: str) -> None:
    """Waits for it; a job that ends otherwise is a failure at once."""

    def reached() -> bool:
        now = cluster.job(job)["JobState"]
        assert now in (state, *GOES_ON), f"job {job} is {now}\n{log.read_text()[-5000:]}"
        return now == state

    wait_for(state, log, reached)


def wait_for(what: str, log: Path, condition: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        text = log.read_text() if log.exists() else "nothing was logged"
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s\n{text[-5000:]}"
        time.sleep(0.2)


def test_a_job_saves_before_its_limit_and_is_requeued_until_it_is_finished(
    cluster: slurm.Slurm, shards: Path, tmp_path: Path
) -> None:
    steps, expected = uninterrupted(cluster, shards, tmp_path)
    work_dir, log = tmp_path / "work", tmp_path / "job.log"
    job = submit(cluster, log, work_dir, "--shards", str(shards), "--train-iters", str(steps))
    wait_for("first step", log, lambda: losses(work_dir))
    # Half of the limit, which the template's five minutes of warning now reach.
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=5")
    wait_for("requeue", log, lambda: cluster.job(job)["Restarts"] == "1")
    reached = max(losses(work_dir))
    assert 1 <= reached < steps
    assert f"saved {work_dir}/checkpoints/iter_{reached:07d}" in log.read_text()

    wait_for_state(cluster, job, log, "PENDING")
    # Not at once: for a second or two the nodes take the job's new credential for the old one.
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10", "StartTime=now+5")
    wait_for_state(cluster, job, log, "COMPLETED")
    assert f"resuming from {work_dir}/checkpoints/iter_{reached:07d}" in log.read_text()
    assert losses(work_dir) == expected
    logs = work_dir / "logs" / f"{job}.0"
    assert {path.name for path in logs.iterdir()} == {"node0", "node1"}
    texts = [file.read_text() for file in logs.rglob("stdout.log")]  # agents meet in any order
    assert sorted(f"step 1/{steps} |" in text for text in texts) == [False, True]


def test_a_mistake_is_told_and_not_requeued(cluster: slurm.Slurm, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    job = submit(cluster, log, tmp_path / "work", "--shards", str(tmp_path / "absent"))
    wait_for_state(cluster, job, log, "FAILED")
    assert cluster.job(job)["Restarts"] == "0"
    assert "there is no such folder" in log.read_text()
    assert "not requeued: the first attempt ended before any checkpoint" in log.read_text()
    assert os.listdir(tmp_path / "work") == ["logs"]


def test_a_cancelled_job_saves_and_is_not_requeued(
    cluster: slurm.Slurm, shards: Path, tmp_path: Path
) -> None:
    work_dir, log = tmp_path / "work", tmp_path / "job.log"
    job = submit(cluster, log, work_dir, "--shards", str(shards), "--train-iters", "1000")
    wait_for("first step", log, lambda: losses(work_dir))
    cluster.run("scancel", job)
    checkpoints = work_dir / "checkpoints"
    wait_for("checkpoint", log, lambda: list(checkpoints.glob("iter_*")), slurm.KILL_WAIT)
    wait_for_state(cluster, job, log, "CANCELLED")
    assert cluster.job(job)["Restarts"] == "0"
    assert "requeued" not in log.read_text()
