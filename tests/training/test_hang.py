"""A run in which a rank hangs ends in time; one line says which rank and where the others wait."""

import datetime
import re
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from megatron_gmai.training.watchdog import Watchdog, silent_ranks, spans, within
from tests.training.command import finish, start, wait_for_step
from tests.training.faulty import faulty

MINUTES = 0.5
LIMIT = ("--distributed-timeout-minutes", str(MINUTES))
MORE = 90  # seconds for the report, and for torchrun to notice, on a machine with other work


def ended(work_dir: Path, output: str, speaker: int) -> None:
    assert output.count("made no progress for") == 1, output
    assert f"[rank {speaker}] step " in output
    assert "another rank is gone" not in output
    assert "watchdog.py" in (work_dir / f"stacks.{speaker}.txt").read_text()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named_and_all_ranks_end(
    stopped: int, shards: Path, tmp_path: Path
) -> None:
    process = start(shards, tmp_path, 2, "--tp", "2", *LIMIT, "--train-iters", "1000")
    wait_for_step(process, tmp_path, 2)
    ranks = psutil.Process(process.pid).children()
    rank = next(rank for rank in ranks if rank.environ().get("RANK") == str(stopped))
    rank.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        output = finish(process, timeout=MINUTES * 60 + MORE)
    finally:
        if rank.is_running():
            rank.kill()
    assert time.monotonic() - began > MINUTES * 60 / 2
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert process.returncode != 0 and not alive
    ended(tmp_path, output, speaker=1 - stopped)
    assert f"rank {stopped}: does not answer" in output
    assert " in step " in output.split(f"rank {1 - stopped}: ")[1]


def test_a_process_that_stops_while_all_save_is_named_too(shards: Path, tmp_path: Path) -> None:
    """Reading start weights and saving may take longer than the time-out, as they do here."""
    fault = (
        "from megatron_gmai.training import checkpoint\n"
        "import os, signal, time\n"
        "write = checkpoint.write_pieces\n"
        "def slowly(*arguments):\n"
        "    time.sleep(20)\n"
        "    if len(list(arguments[1].parent.glob('iter_*'))):\n"
        "        os.kill(os.getpid(), signal.SIGSTOP) if rank == 1 else None\n"
        "    write(*arguments)\n"
        "checkpoint.write_pieces = slowly\n"
        "from megatron_gmai.training import setup\n"
        "fill = setup.fill_base\n"
        "setup.fill_base = lambda *a: (time.sleep(20 if rank else 0), fill(*a))"
    )
    program = faulty(tmp_path / "program.py", fault)
    work_dir = tmp_path / "work"
    limit = ("--distributed-timeout-minutes", "0.25")
    process = start(shards, work_dir, 2, "--tp", "2", *limit, program=program)
    output = finish(process, timeout=240)
    assert process.returncode != 0
    assert f"saved {work_dir}/checkpoints/iter_0000003" in output
    ended(work_dir, output, speaker=0)
    assert "rank 1: does not answer" in output


def test_a_rank_that_waits_elsewhere_is_told_from_those_in_a_collective(
    shards: Path, tmp_path: Path
) -> None:
    fault = (
        "from megatron_gmai.training import step\n"
        "exact, calls = step.forward_step, []\n"
        "def wait_for_a_disk(*arguments, **options):\n"
        "    calls.append(1)\n"
        "    if rank == 1 and len(calls) == 4:\n"
        "        import time; time.sleep(600)\n"
        "    return exact(*arguments, **options)\n"
        "step.forward_step = wait_for_a_disk"
    )
    program = faulty(tmp_path / "program.py", fault)
    work_dir = tmp_path / "work"
    process = start(shards, work_dir, 2, "--tp", "2", *LIMIT, program=program)
    output = finish(process, timeout=240)
    assert process.returncode != 0
    assert output.count("made no progress for") == 1, output
    assert "rank 1: wait_for_a_disk (program.py:" in output
    ((collective, caller),) = re.findall(r"rank 0: (all_\w+) of \w+ \((\w+)\.py:", output)
    assert caller != "typing_extensions"  # what marks a function as deprecated calls none by itself
    assert f"in {collective}" in (work_dir / "stacks.0.txt").read_text()
    assert "wait_for_a_disk" in (work_dir / "stacks.1.txt").read_text()
    # What a GPU's rank waits in is known to torch's flight recorder alone.
    assert re.search(rf"{caller}\.py:\d+\) \(gloo:\w+ \[\[.*\]\] over group .*\) in step", output)
    assert (work_dir / "collectives_0").stat().st_size > 0


def test_it_reaches_the_store_while_its_rank_waits_there_for_another(tmp_path: Path) -> None:
    """A rank waits in the store for the groups that another has still to join."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        watchdog = Watchdog(tmp_path, timeout=60)
        seconds = datetime.timedelta(seconds=60)
        waiter = threading.Thread(target=store.wait, args=(["late"], seconds))
        waiter.start()
        time.sleep(0.5)
        assert within(30, lambda: watchdog.store.set("told", "something") or True)
        dist.TCPStore("127.0.0.1", store.port).set("late", "")
        waiter.join(60)
    finally:
        dist.destroy_process_group()


def test_ranks_are_named_in_spans() -> None:
    assert spans([3]) == "rank 3"
    assert spans([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_a_rank_is_silent_if_it_tells_nothing_new() -> None:
    before = {0: {"looks": 3}, 1: {"looks": 7}}
    after = {0: {"looks": 4}, 1: {"looks": 7}}
    assert silent_ranks(before, after, size=3) == {1, 2}
