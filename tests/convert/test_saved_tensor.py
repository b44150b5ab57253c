"""A stranger's archive of a tensor is read or refused: soon, and in the memory of its size."""

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gmai.convert.memory import ReusedMemory
from megatron_gmai.convert.saved_tensor import read_saved

Change = Callable[[zipfile.ZipFile], None]


def archive(content: Any, change: Change = lambda archive: None) -> bytes:
    """As torch.save wrote it, and changed."""
    written = io.BytesIO()
    torch.save(content, written)
    with zipfile.ZipFile(written, "a") as opened:
        change(opened)
    return written.getvalue()


def compressed(opened: zipfile.ZipFile) -> None:
    opened.writestr("archive/extra", bytes(1 << 20), zipfile.ZIP_DEFLATED)


def overlapping(opened: zipfile.ZipFile) -> None:
    opened.writestr("archive/extra", bytes(1 << 10))
    opened.filelist += [opened.filelist[-1]] * 99


@pytest.mark.parametrize(
    "content, message",
    [
        (archive(torch.ones(1).expand(1 << 40)), "does not hold every number"),
        (archive(torch.ones(9), compressed), "larger than all of it"),
        (archive(torch.ones(9), overlapping), "larger than all of it"),
        (archive(torch.ones(9)).replace(b"archive/data/0", b"archive/data/1"), "data/0"),
        (archive(os.system), "^it is no tensor$"),
        (archive(torch.ones(9))[:-1], "end of the file"),
    ],
)
def test_what_is_no_whole_tensor_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    length = len(content) + (message == "end of the file")
    with pytest.raises((ValueError, RuntimeError), match=message):
        read_saved(tmp_path / "x", 0, length, ReusedMemory())


@pytest.mark.parametrize("before", [0, 1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_part_of_a_storage_at_any_place_is_read(
    tmp_path: Path, before: int, dtype: torch.dtype
) -> None:
    tensor = torch.randn(7, 9).to(dtype)[1:, 2:].T
    content = archive(tensor)
    (tmp_path / "x").write_bytes(bytes(before) + content + b"more")
    found = read_saved(tmp_path / "x", before, len(content), ReusedMemory())
    assert torch.equal(found, tensor) and found.dtype == dtype
