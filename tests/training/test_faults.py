"""What becomes of a run when something goes wrong: it ends soon, says why once, and continues."""

import json
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from tests.training.command import (
    STEPS,
    finish,
    launcher,
    losses,
    run,
    start,
    trained,
    wait_for_step,
)
from tests.training.faulty import SLOW, faulty

TP2 = ("--tp", "2")
ENDS_WITHIN = 150  # seconds after a rank is gone, on a machine with other work


@pytest.fixture(scope="module")
def uninterrupted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run that nothing disturbed."""
    work_dir = tmp_path_factory.mktemp("uninterrupted")
    trained(shards, work_dir, 2, *TP2)
    assert list(losses(work_dir)) == list(range(1, STEPS + 1))
    return work_dir


@pytest.fixture(scope="module")
def killed(
    shards: Path, uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int | None]:
    """The work directory of a run whose second rank was killed after step 5, and its status."""
    work_dir = tmp_path_factory.mktemp("killed")
    program = faulty(tmp_path_factory.mktemp("slow") / "program.py", SLOW)
    process = start(shards, work_dir, 2, *TP2, program=program)
    wait_for_step(process, work_dir, 5)
    ranks = psutil.Process(process.pid).children()
    second = next(rank for rank in ranks if rank.environ().get("RANK") == "1")
    second.send_signal(signal.SIGKILL)
    finish(process, timeout=ENDS_WITHIN)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert alive == []
    return work_dir, process.returncode


@pytest.fixture
def work_dir(killed: tuple[Path, int | None], tmp_path: Path) -> Path:
    """A copy of the killed run's work directory."""
    shutil.copytree(killed[0], tmp_path / "work")
    return tmp_path / "work"


def test_a_killed_rank_ends_the_run(killed: tuple[Path, int | None], uninterrupted: Path) -> None:
    work_dir, status = killed
    assert status not in (0, None)
    assert 5 <= len(losses(work_dir)) < STEPS
    assert (work_dir / "checkpoints" / "iter_0000003").is_dir()


def test_resuming_reproduces_the_uninterrupted_run_bitwise(
    shards: Path, work_dir: Path, uninterrupted: Path
) -> None:
    output = finish(start(shards, work_dir, 2, *TP2, "--resume"))
    assert "resuming from" in output
    assert losses(work_dir) == losses(uninterrupted)


def test_resuming_in_another_layout_reproduces_it_to_rounding(
    shards: Path, work_dir: Path, uninterrupted: Path
) -> None:
    output = trained(shards, work_dir, 1, "--resume")
    expected = losses(uninterrupted)
    assert losses(work_dir).keys() == expected.keys(), output
    for iteration, row in losses(work_dir).items():
        assert row == pytest.approx(expected[iteration], rel=1e-4)


def test_a_full_disk_is_told_in_one_message(shards: Path, work_dir: Path) -> None:
    before = sorted(path.name for path in (work_dir / "checkpoints").iterdir())
    limited = ("bash", "-c", 'ulimit -f 4000 && exec "$@"', "bash")  # KiB a file
    process = start(shards, work_dir, 1, "--resume", prefix=limited)
    output = finish(process)
    assert process.returncode == 2
    assert output.count("error: could not save") == 1
    assert "Traceback" not in output
    assert sorted(path.name for path in (work_dir / "checkpoints").iterdir()) == before


def test_a_mistake_in_the_flags_is_told_once_by_all_ranks(shards: Path, tmp_path: Path) -> None:
    process = start(shards, tmp_path / "work", 2, "--tp", "2", "--freeze-vit", "--freeze-llm",
                    "--freeze-projector")  # fmt: skip
    output = finish(process)
    assert process.returncode != 0
    assert output.count("nothing is left to train") == 1
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_rank_is_shown_once_and_ends_all(failing: int, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os\n"
        "import torch.distributed as dist\n"
        "from megatron_gmai.training.resilience import run_guarded\n"
        "def main():\n"
        "    dist.init_process_group('gloo')\n"
        f"    if dist.get_rank() == {failing}:\n"
        "        raise RuntimeError('the cause')\n"
        "    dist.barrier()\n"
        "    raise RuntimeError('not reached')\n"
        "run_guarded(main)\n"
    )
    process = run([*launcher(2), str(program)])
    output = finish(process, timeout=ENDS_WITHIN)
    assert process.returncode not in (0, None)
    assert output.count("RuntimeError: the cause") == 1
    assert f"[rank {failing}] Traceback" in output
    assert "not reached" not in output


def test_a_killed_run_leaves_no_loader_process(shards: Path, tmp_path: Path) -> None:
    process = start(shards, tmp_path / "work", 1, "--num-workers", "1")
    wait_for_step(process, tmp_path / "work", 1)
    others = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    _, alive = psutil.wait_procs(others, timeout=ENDS_WITHIN)
    assert others and not alive
    process.wait()


def test_an_interrupted_process_leaves_quietly(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from megatron_gmai.training.resilience import run_guarded\n"
        "def main():\n"
        "    raise KeyboardInterrupt\n"
        "run_guarded(main)\n"
    )
    process = run([*launcher(1), str(program)])
    assert (finish(process), process.returncode) == ("", 130)


def test_only_the_checkpoints_that_are_asked_for_stay(shards: Path, tmp_path: Path) -> None:
    flags = ("--checkpoint-interval", "2", "--keep-last", "2", "--keep-every", "4")
    output = trained(shards, tmp_path, 1, *flags)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("*iter_*"))
    assert kept == [f"iter_{number:07d}" for number in (4, 8, 10)], output
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all((row["save_time_s"] > 0) == (row["iteration"] in (3, 5, 7, 9)) for row in rows)


def test_a_save_that_fails_is_tried_again_and_the_run_goes_on(
    shards: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """The second rank's disk is full while step 3 is saved; from step 6 on it is not."""
    fault = (
        "from megatron_gmai.training import checkpoint\n"
        "write, saves = checkpoint.write_pieces, []\n"
        "def once(*arguments):\n"
        "    saves.append(1)\n"
        "    if rank == 1 and len(saves) == 1:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))\n"
        "    try:\n"
        "        write(*arguments)\n"
        "    finally:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\n"
        "checkpoint.write_pieces = once\n"
        "import resource"
    )
    work_dir = tmp_path / "work"
    program = faulty(tmp_path / "program.py", fault)
    output = trained(shards, work_dir, 2, *TP2, program=program)
    assert output.count("warning: could not save") == 1, output
    saved = sorted(path.name for path in (work_dir / "checkpoints").glob("*iter_*"))
    assert saved == [f"iter_{number:07d}" for number in (6, 9, 10)]
    assert losses(work_dir) == losses(uninterrupted)


def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on_by_itself(
    shards: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    program = faulty(tmp_path / "program.py", SLOW)
    process = start(shards, tmp_path, 2, *TP2, restarts=1, program=program)
    wait_for_step(process, tmp_path, 5)
    ranks = psutil.Process(process.pid).children()
    second = next(rank for rank in ranks if rank.environ().get("RANK") == "1")
    second.send_signal(signal.SIGKILL)
    output = finish(process)
    assert process.returncode == 0, output
    assert "restart 1 by torchrun" in output
    assert f"resuming from {tmp_path}/checkpoints/iter_000000" in output
    assert losses(tmp_path) == losses(uninterrupted)


def test_saving_while_training_goes_on_gives_the_same_files(
    shards: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """The next save waits for a slow one; steps do not, and what they change is not saved."""
    fault = (
        "from megatron_gmai.training import checkpoint\n"
        "import time\n"
        "write = checkpoint.write_pieces\n"
        "def slowly(*arguments):\n"
        "    time.sleep(3)\n"
        "    write(*arguments)\n"
        "checkpoint.write_pieces = slowly"
    )
    work_dir = tmp_path / "work"
    program = faulty(tmp_path / "program.py", fault)
    output = trained(shards, work_dir, 2, *TP2, "--async-save", program=program)
    assert losses(work_dir) == losses(uninterrupted)
    for number in (3, 6, 9, 10):
        name = f"iter_{number:07d}"
        assert tensors(work_dir / "checkpoints" / name) == tensors(
            uninterrupted / "checkpoints" / name
        )
    assert output.index("step 4/") < output.index("iter_0000003 (")
    rows = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[3]["save_time_s"] < 3


def tensors(folder: Path) -> dict[str, int]:
    """CRC-32 of the files that hold tensors."""
    stored = json.loads((folder / "manifest.json").read_text())["crc32"]
    return {name: value for name, value in stored.items() if name.endswith(".distcp")}
