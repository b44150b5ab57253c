"""Runs of the entry script as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_gmai.runtime.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10


def start(
    shards: Path,
    work_dir: Path,
    ranks: int,
    *flags: str,
    prefix: tuple[str, ...] = (),
    program: Path = ROOT / "pretrain_gmai_vl.py",
    restarts: int = 0,
) -> subprocess.Popen[str]:
    """Start `ranks` processes of the tiny model for STEPS steps; output is kept."""
    command = [*prefix, *launcher(ranks, restarts), str(program)]
    command += ["--preset", "gmai-vl-tiny", "--shards", str(shards), "--work-dir", str(work_dir)]
    command += ["--max-length", "256", "--global-batch-size", "2", "--train-iters", str(STEPS)]
    command += ["--log-interval", "1", "--checkpoint-interval", "3", "--device", "cpu", *flags]
    return run(command)


def launcher(ranks: int, restarts: int = 0) -> list[str]:
    if ranks == 1:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    return [*torchrun, f"--master-port={free_port()}", f"--max-restarts={restarts}"]


def run(command: list[str]) -> subprocess.Popen[str]:
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> str:
    """Wait for the end; the output. What is still running after the time-out is ended."""
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def losses(work_dir: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by iteration, as `metrics.jsonl` tells them."""
    file = work_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["iteration"]: (row["loss"], row["grad_norm"]) for row in rows}


def wait_for_step(process: subprocess.Popen[str], work_dir: Path, step: int) -> None:
    """Return as soon as the run has written this step; the run must not end before."""
    while step not in losses(work_dir):
        assert process.poll() is None, finish(process)
        time.sleep(0.02)
