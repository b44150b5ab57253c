"""A run's folders: writable, its own alone, shared by all ranks; damaged rows are dropped."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from megatron_gmai.config import Config, DataConfig, RunConfig
from megatron_gmai.convert.manifest import write_manifest
from megatron_gmai.training import folders
from megatron_gmai.training.folders import LOCK_FILE, hold, make_folders, record_run
from megatron_gmai.training.metrics import keep_rows_up_to

OTHER_RUN = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 7 on n7")
file.flush()
print(flush=True)
while True:
    time.sleep(0.02)
    if sys.argv[2] == "lives":
        os.utime(sys.argv[1])
"""


@contextmanager
def other_run(folder: Path, state: str) -> Iterator[None]:
    command = [sys.executable, "-c", OTHER_RUN, str(folder / LOCK_FILE), state]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()


def test_a_folder_belongs_to_one_run_as_long_as_that_lives(tmp_path: Path) -> None:
    with mock.patch.object(folders, "BEAT_S", 0.2):
        with (
            other_run(tmp_path, "lives"),
            pytest.raises(ValueError, match="process 7 on n7, whose"),
        ):
            hold(tmp_path)
        with other_run(tmp_path, "hangs"):  # as the lock of a machine that is gone
            assert hold(tmp_path) is None
    handle = hold(tmp_path)
    assert handle is not None
    assert f"process {os.getpid()} on" in (tmp_path / LOCK_FILE).read_text()
    handle.close()


def test_ranks_that_see_other_folders_or_checkpoints_are_named() -> None:
    same = ("n1", True, "iter_0000003")
    assert folders._difference([same, same]) == ""
    assert "rank 1 (n2) cannot see" in folders._difference([same, ("n2", False, None)])
    other = folders._difference([same, same, ("n2", True, "iter_0000002")])
    assert other == "rank 2 (n2) would resume from iter_0000002, rank 0 (n1) from iter_0000003."


def test_a_checkpoint_without_the_file_of_a_rank_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"1")
    with pytest.raises(OSError, match="no __1_0.distcp: all ranks have to write to the same"):
        write_manifest(tmp_path, {}, Config(), True, {"__0_0.distcp": 1, "__1_0.distcp": 2})
    assert not (tmp_path / "manifest.json").exists()


def test_a_place_that_cannot_be_written_is_a_mistake_and_a_full_disk_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    run = RunConfig(work_dir=str(tmp_path), save=str(tmp_path / "file" / "checkpoints"))
    with pytest.raises(ValueError, match="file/checkpoints cannot be written: Not a directory"):
        make_folders(Config(run=run))
    run = RunConfig(work_dir=str(tmp_path), save=str(tmp_path))
    config = Config(run=run, data=DataConfig(tokenizer="absent"))
    full = OSError(28, "No space left on device", "x")
    with mock.patch.object(folders, "write_atomically", side_effect=full):
        record_run(config, 1)
    assert "warning: [Errno 28]" in capsys.readouterr().out
    locked = OSError(30, "Read-only file system", "x")
    with (
        mock.patch.object(folders, "write_atomically", side_effect=locked),
        pytest.raises(ValueError, match="x cannot be written: Read-only"),
    ):
        record_run(config, 1)


def test_rows_that_a_crash_of_the_machine_has_damaged_are_dropped(tmp_path: Path) -> None:
    rows = [json.dumps({"iteration": n}) + "\n" for n in range(1, 6)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(rows))
    with mock.patch("megatron_gmai.training.metrics.write_atomically") as written:
        keep_rows_up_to(file, 4)  # needs no space
    assert not written.called and file.read_text() == "".join(rows[:4])
    file.write_text("".join([rows[0], "\0" * 20 + "\n", *rows[2:]]))
    keep_rows_up_to(file, 4)
    assert file.read_text() == "".join([rows[0], *rows[2:4]])
