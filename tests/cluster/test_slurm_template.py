"""What the Slurm template starts, and when it puts its job back into the queue."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_gmai.cli import parse
from tests.training.command import ROOT

TEMPLATE = ROOT / "examples" / "slurm" / "train.sbatch"


@dataclass
class Job:
    """A job whose Slurm programs are stand-ins: srun writes down its arguments, then does `body`;
    scontrol writes down what it is asked for."""

    folder: Path

    def run(
        self, body: str = "", flags: tuple[str, ...] = ("--lr", "1"), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        programs = self.folder / "bin"
        programs.mkdir(exist_ok=True)
        bodies = {
            "srun": f'printf "%s\\n" "$@" > {self.folder}/srun\n{body}',
            "scontrol": f'echo "$@" >> {self.folder}/scontrol\necho n1\necho n2',
        }
        for name, text in bodies.items():
            (programs / name).write_text(f"#!/bin/bash\n{text}\n")
            (programs / name).chmod(0o755)
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "4",
            "SLURM_JOB_NODELIST": "n[1-4]",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_ON_NODE": "96",
            **variables,
        }
        command = ["bash", str(TEMPLATE), str(self.work_dir), *flags]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)

    @property
    def work_dir(self) -> Path:
        return self.folder / "work"

    @property
    def words(self) -> list[str]:
        return (self.folder / "srun").read_text().splitlines()

    @property
    def requeued(self) -> bool:
        asked = self.folder / "scontrol"
        return asked.exists() and "requeue 7" in asked.read_text().splitlines()

    def save(self, step: int) -> str:
        """Shell words that leave a checkpoint."""
        return f"mkdir -p {self.work_dir}/checkpoints/iter_{step:07d};"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


class TestStart:
    def test_agents_meet_on_the_first_node_and_start_a_process_for_each_gpu(self, job: Job) -> None:
        job.run()
        assert {"--nnodes=4", "--nproc-per-node=8", "--rdzv-backend=c10d"} <= set(job.words)
        assert "--rdzv-endpoint=n1:20007" in job.words
        assert "--cpus-per-task=96" in job.words

    def test_only_the_first_node_hosts_the_meeting_whatever_its_name(self, job: Job) -> None:
        program = job.folder / "python"
        program.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
        program.chmod(0o755)
        on_each = (
            'while [[ $1 != bash ]]; do shift; done; for n in 0 1; do SLURM_NODEID=$n "$@"; done'
        )
        done = job.run(on_each, RDZV_HOST="10.0.0.1", PYTHON=str(program))
        lines = done.stdout.splitlines()
        assert [line for line in lines if "is_host" in line] == [
            "--rdzv-conf=is_host=1",
            "--rdzv-conf=is_host=0",
        ], done.stderr
        assert "--rdzv-endpoint=10.0.0.1:20007" in lines

    def test_training_resumes_and_never_falls_to_a_cpu(self, job: Job) -> None:
        job.run(flags=("@examples/recipes/phase1.args", "--lr", "2e-3"))
        words = job.words
        config = parse(words[words.index("pretrain_gmai_vl.py") + 1 :]).config
        assert (config.run.device, config.run.resume) == ("cuda", True)
        assert (config.run.work_dir, config.train.lr) == (str(job.work_dir), 2e-3)

    def test_a_container_sees_the_project_and_what_is_named(self, job: Job) -> None:
        job.run(CONTAINER_IMAGE="gmai.sqsh", CONTAINER_MOUNTS="/data")
        assert "--container-image=gmai.sqsh" in job.words
        assert f"--container-mounts={ROOT},/data" in job.words
        assert "--no-container-mount-home" in job.words

    def test_without_a_container_nothing_is_said_of_one(self, job: Job) -> None:
        job.run()
        assert not [word for word in job.words if word.startswith("--container")]

    def test_a_variable_that_is_set_is_kept(self, job: Job) -> None:
        job.run("env > " + str(job.folder / "env"), NCCL_DEBUG="INFO")
        variables = (job.folder / "env").read_text().splitlines()
        assert {"NCCL_DEBUG=INFO", "CUDA_DEVICE_MAX_CONNECTIONS=1"} <= set(variables)

    def test_a_forgotten_folder_is_told(self, job: Job) -> None:
        done = job.run(flags=())
        assert (done.returncode, "usage: sbatch" in done.stderr) == (2, True)


class TestRequeue:
    def test_a_finished_run_is_done(self, job: Job) -> None:
        assert job.run(job.save(5)).returncode == 0
        assert not job.requeued

    def test_a_run_that_saved_goes_on(self, job: Job) -> None:
        done = job.run(job.save(5) + "exit 1")
        assert job.requeued, done.stderr

    @pytest.mark.parametrize("words", ["--save {}", "--save={}"])
    def test_checkpoints_may_lie_elsewhere(self, job: Job, words: str) -> None:
        place = job.folder / "elsewhere"
        flags = ("--lr", "1", *words.format(place).split(), "--keep-last", "2")
        done = job.run(f"mkdir -p {place}/iter_0000005; exit 1", flags=flags)
        assert job.requeued, done.stderr

    def test_an_attempt_without_any_checkpoint_is_a_mistake(self, job: Job) -> None:
        done = job.run("exit 2")
        assert (done.returncode, job.requeued) == (2, False)
        assert "ended before any checkpoint" in done.stderr

    def test_one_attempt_without_progress_is_forgiven_and_a_second_is_not(self, job: Job) -> None:
        job.run(job.save(5) + "exit 1")
        (job.folder / "scontrol").unlink()
        job.run("exit 1", SLURM_RESTART_COUNT="1")
        assert job.requeued
        (job.folder / "scontrol").unlink()
        done = job.run("exit 1", SLURM_RESTART_COUNT="2")
        assert not job.requeued
        assert "no progress beyond" in done.stderr and "iter_0000005" in done.stderr

    def test_progress_in_between_is_a_new_beginning(self, job: Job) -> None:
        for step, body in enumerate(["exit 1", "", "exit 1"], 1):
            job.run(job.save(5 if body else 6) + "exit 1", SLURM_RESTART_COUNT=str(step))
        assert job.requeued

    def test_the_number_of_attempts_is_bounded(self, job: Job) -> None:
        done = job.run(job.save(5) + "exit 1", SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
        assert not job.requeued
        assert "requeued 3 times" in done.stderr
