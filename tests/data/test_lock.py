"""One builder a folder: a second one waits, and says for whom."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_gmai.data.lock import LOCK_FILE, building

HOLD = """
import sys
from pathlib import Path
from megatron_gmai.data.lock import building
with building(Path(sys.argv[1]), print) as holder:
    holder.tell("12 of 90")
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the folder's lock until its input ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_waits_for_the_first_and_says_who_and_how_far(tmp_path: Path) -> None:
    lines: list[str] = []
    first = hold(tmp_path)

    def told(line: str) -> None:
        lines.append(line)
        first.communicate(timeout=60)  # its input ends

    with building(tmp_path, told):
        assert first.returncode == 0
    (line,) = lines
    assert f"process {first.pid} on" in line and "12 of 90" in line
    assert (tmp_path / LOCK_FILE).read_text() == ""


def test_a_builder_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    first = hold(tmp_path)
    with building(tmp_path, lambda line: first.kill()):
        assert first.wait() == -signal.SIGKILL


def test_a_lock_that_is_no_file_is_refused_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("mine")
    for plant in (lambda at: at.symlink_to(tmp_path / "letter"), os.mkfifo):
        plant(tmp_path / LOCK_FILE)
        with pytest.raises(ValueError, match="delete it"), building(tmp_path, print):
            pass
        (tmp_path / LOCK_FILE).unlink()
    assert (tmp_path / "letter").read_text() == "mine"
