"""Conversions that a kill, a full disk or a second one gets in the way of: real programs, real
files."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_gmai.convert.huggingface import open_pretrained
from megatron_gmai.convert.manifest import read_manifest
from tests.convert.conftest import Export
from tools.convert_checkpoint import main

ROOT = Path(__file__).resolve().parents[2]
# Stands still in the middle of its writing until a line comes, or dies there.
PAUSED = """
import sys
sys.argv[0] = "convert_checkpoint.py"
from megatron_gmai.convert.output import Progress
from tools.convert_checkpoint import main
count = 0
def wait(self, size):
    global count
    count += 1
    if count == 20:
        print("in the middle", flush=True)
        sys.stdin.readline()
Progress.__call__ = wait
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def source(export: Callable[..., Export]) -> Path:
    return export(folder="source").folder


@pytest.fixture
def earlier(source: Path, tmp_path: Path) -> Path:
    """A checkpoint, which is the earlier output of one way and the source of the other."""
    folder = tmp_path / "earlier"
    assert main(["from-hf", "--model", str(source), "--output", str(folder)]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def words(way: str, source: Path, earlier: Path, output: Path) -> list[str]:
    given = ["--model", str(source)] if way == "from-hf" else ["--load", str(earlier)]
    return [way, *given, "--output", str(output)]


def paused(command: list[str]) -> subprocess.Popen[str]:
    """The program, when it is in the middle."""
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, *command],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "in the middle\n"
    return process


@pytest.mark.parametrize("way", ["from-hf", "to-hf"])
def test_killed_or_asked_to_end_or_met_by_another(
    way: str, source: Path, earlier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(source), contents(earlier)
    output = tmp_path / "out"
    command = words(way, source, earlier, output)

    killed = paused(command)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists() and (tmp_path / ".out.partial").is_dir()

    ended = paused(command)  # which clears what the other left
    assert main(command) == 2
    assert "another process is writing" in capsys.readouterr().err
    ended.terminate()
    ended.communicate()
    assert ended.returncode == 128 + signal.SIGTERM
    assert not output.exists() and not list(tmp_path.glob(".out*"))

    assert main(command) == 0
    assert (contents(source), contents(earlier)) == before
    if way == "from-hf":
        assert contents(output) == contents(earlier)
        assert read_manifest(output).checksums
    else:
        assert open_pretrained(output).weights.keys() == open_pretrained(source).weights.keys()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB; only root can mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("way", ["from-hf", "to-hf"])
@pytest.mark.parametrize("asked_before", [True, False])
def test_a_full_disk_is_told_in_a_sentence_and_left_as_it_was(
    way: str,
    asked_before: bool,
    small_disk: Path,
    source: Path,
    earlier: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not asked_before:  # something else fills the disk meanwhile
        monkeypatch.setattr("megatron_gmai.convert.output._check_room", lambda *_: None)
    (small_disk / "mine").write_text(json.dumps("before"))
    before = contents(source), contents(earlier)
    assert main(words(way, source, earlier, small_disk / "out")) == 2
    said = capsys.readouterr().err
    assert ("GB are needed on the disk of" if asked_before else "the disk filled up") in said
    assert said.count("\n") == 1
    assert [path.name for path in small_disk.iterdir()] == ["mine"]
    assert (contents(source), contents(earlier)) == before
