"""A folder is whole or not there; what is there already is never touched."""

import errno
import fcntl
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megatron_gmai.convert.crc32 import joined
from megatron_gmai.convert.disk_file import _BUFFER, DiskFile
from megatron_gmai.convert.memory import ReusedMemory
from megatron_gmai.convert.output import Progress, new_folder
from megatron_gmai.convert.read_ahead import read_ahead
from megatron_gmai.convert.safetensors_file import write_safetensors
from tests.convert.conftest import Export


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def test_what_was_written_appears_at_the_end(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "x"


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("x")
    assert (tmp_path / "out" / "a").is_file()


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_is_followed(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "disk" / "target"
    target.parent.mkdir()
    if exists:
        target.mkdir()
    (tmp_path / "out").symlink_to(target)
    with new_folder(tmp_path / "out") as partial:
        assert partial.parent == target.parent
        (partial / "a").write_text("x")
    assert (tmp_path / "out").is_symlink() and (target / "a").is_file()


@pytest.mark.parametrize("kind", ["a mount point", "the working directory"])
def test_what_cannot_be_replaced_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "is_mount", lambda self: kind == "a mount point")
    with (
        pytest.raises(ValueError, match=f"is {kind}; choose a new folder inside it"),
        new_folder(Path(".")),
    ):
        raise AssertionError("never entered")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["file", "folder"])
def test_what_exists_is_refused_and_untouched(tmp_path: Path, content: str) -> None:
    if content == "file":
        (tmp_path / "out").write_text("mine")
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "latest").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(ValueError, match="exists already and is not empty"),
        new_folder(tmp_path / "out"),
    ):
        raise AssertionError("never entered")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="the disk filled up; nothing was kept of .*out"),
        new_folder(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("needed", "free", "said"),
    [(15_200_000_000, 3 * 10**9, "15.2 GB .* 3 GB"), (482_000, 307_200, "0.000482 GB .* 0.000307")],
)
def test_a_disk_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: int, free: int, said: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with (
        pytest.raises(ValueError, match=said),
        new_folder(tmp_path / "out", needed_bytes=needed),
    ):
        raise AssertionError("never entered")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    (left / "folder").mkdir(parents=True)
    (left / "old").write_text("half")
    with new_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert not left.exists()


def test_two_at_once_are_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("x")
        with (
            pytest.raises(ValueError, match="another process is writing .*out"),
            new_folder(tmp_path / "out"),
        ):
            raise AssertionError("never entered")
    assert (tmp_path / "out" / "a").read_text() == "x"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_modes_follow_the_umask(
    export: Callable[..., Export], umask: Callable[[int], int], mask: int, mode: int
) -> None:
    umask(mask)
    folder = export().folder
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_safetensors_file_reads_back_in_the_library(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(3, 5), "b.c": torch.randn(7), "d": torch.randn(2, 3, 4).mT}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", shapes, dtype, tensors.values())
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name].to(dtype)) for name in tensors)


def test_reading_ahead_keeps_order_and_errors() -> None:
    def make(number: int) -> int:
        time.sleep(0.01 * (number % 2))  # later ones are there earlier
        if number == 5:
            raise ValueError("the sixth")
        return number

    seen = []
    with pytest.raises(ValueError, match="the sixth"):
        for item in read_ahead(partial(make, number) for number in range(9)):
            seen.append(item)
    assert seen == [0, 1, 2, 3, 4]


def test_reading_ahead_makes_few_items_before_their_time() -> None:
    asked: list[int] = []

    def makers() -> Iterator[Callable[[], int]]:
        for number in range(99):
            asked.append(number)
            yield partial(int, number)

    ahead = read_ahead(makers())
    assert [next(ahead), next(ahead)] == [0, 1] and len(asked) == 4


def test_reading_ahead_ends_when_it_is_closed() -> None:
    called: list[int] = []

    def make(number: int) -> None:
        called.append(number)
        time.sleep(0.2 * (number > 0))

    before = torch.get_num_threads()
    ahead = read_ahead(partial(make, number) for number in range(9))
    next(ahead)
    ahead.close()
    assert sorted(called) in ([0, 1], [0, 1, 2]) and torch.get_num_threads() == before


def test_memory_is_used_again_when_nobody_has_a_part_of_it() -> None:
    memory = ReusedMemory()
    first = memory.new_tensor((4, 8), torch.float32)
    address, part = first.data_ptr(), first[2:]
    second = memory.new_tensor((8,), torch.float32)
    del first
    third = memory.new_tensor((4, 8), torch.float32)
    assert address not in (second.data_ptr(), third.data_ptr())
    part.fill_(7)
    del part
    assert memory.new_tensor((8, 8), torch.bfloat16).data_ptr() == address


@pytest.mark.parametrize("sizes", [(0,), (1, 4095, 1), (3, 2 * _BUFFER, 5), (_BUFFER,) * 5])
@pytest.mark.parametrize("is_direct", [True, False])
def test_a_disk_file_holds_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], is_direct: bool
) -> None:
    if not is_direct:  # a file system that says so with the first bytes
        write = os.pwrite

        def pwrite(file: int, data: memoryview, at: int) -> int:
            if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return write(file, data, at)

        monkeypatch.setattr(os, "pwrite", pwrite)
    parts = [os.urandom(1 << 10) * (size >> 10) + os.urandom(size % (1 << 10)) for size in sizes]
    with DiskFile(tmp_path / "x") as file:
        for part in parts:
            assert file.write(part) == len(part)
        assert file.tell() == sum(sizes)
    assert (tmp_path / "x").read_bytes() == b"".join(parts)


def test_both_threads_may_learn_at_once_that_a_file_is_not_written_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, together = os.pwrite, threading.Barrier(2)

    def pwrite(file: int, data: memoryview, at: int) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            if together.wait(10):
                time.sleep(0.05)  # the other one has turned it off by now
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(file, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with DiskFile(tmp_path / "x") as file:
        file.write(bytes(2 * _BUFFER))
    assert (tmp_path / "x").stat().st_size == 2 * _BUFFER


def test_checksums_of_parts_join() -> None:
    whole = os.urandom(100_000)
    for cut in (0, 1, 77, 65_536, 100_000):
        first, second = whole[:cut], whole[cut:]
        assert joined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(whole)


def test_progress_tells_speed_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 101.0, 104.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = Progress(10 * 10**9)
    progress(10**9)  # too soon to tell
    progress(10**9)
    assert capsys.readouterr().err == "2.0 of 10.0 GB, 500 MB/s, 16 s left\n"
