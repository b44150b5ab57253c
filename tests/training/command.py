"""Runs of the entry script as a user starts them."""

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from megatron_gmai.runtime.processes import free_port
from tests.parallel.world import run_world

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "pretrain_gmai_vl.py"
STEPS = 10


def start(
    shards: Path,
    work_dir: Path,
    ranks: int,
    *flags: str,
    prefix: tuple[str, ...] = (),
    program: Path = PROGRAM,
    restarts: int = 0,
) -> subprocess.Popen[str]:
    """Start `ranks` processes of the tiny model for STEPS steps; output is kept."""
    words = _words(program, shards, work_dir, *flags)
    return run([*prefix, *launcher(ranks, restarts), *words])


def trained(shards: Path, work_dir: Path, ranks: int, *flags: str, program: Path = PROGRAM) -> str:
    """What such a run prints that nothing ends early."""
    return forked(ranks, _words(program, shards, work_dir, *flags))


def forked(ranks: int, words: list[str]) -> str:
    """What a program and its flags print, which has to end well. Its processes are forked from one
    that has imported what they need, so they begin seconds sooner than those of torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        try:
            run_world(ranks, _run, output, words)
        except RuntimeError as error:
            raise AssertionError(f"{output.read_text()}\n{error}") from error
        return output.read_text()


def _run(output: Path, words: list[str]) -> None:
    """The program, in a process of its world."""
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
    sys.stdout.flush()


def _words(program: Path, shards: Path, work_dir: Path, *flags: str) -> list[str]:
    words = [str(program), "--preset", "gmai-vl-tiny", "--shards", str(shards)]
    words += ["--work-dir", str(work_dir), "--max-length", "256", "--global-batch-size", "2"]
    words += ["--train-iters", str(STEPS), "--log-interval", "1", "--checkpoint-interval", "3"]
    return [*words, "--device", "cpu", *flags]


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


def kill(process: subprocess.Popen[str]) -> None:
    """End torchrun and, at the same moment, its ranks, which would outlive it."""
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everyone:
        one.suspend()
    for one in everyone:
        one.kill()
    process.wait()


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
