"""tools/inspect_shards.py: counts on the terminal, samples on a page of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.world import mixed_records, record
from tools import inspect_shards, make_shards


@pytest.fixture
def shards(tmp_path: Path, write_list: Callable, tokenizer_file: Path) -> Path:
    harmful = record("<script>alert(1)</script>", "yes & no")
    broken = record("<image>", "a", "lost.png")
    list_file = write_list(A=mixed_records(tmp_path, 9), B=[harmful, broken], ratio=0.5)
    flags = ["--output", str(tmp_path / "shards"), "--tokenizer", str(tokenizer_file)]
    make_shards.main(["--datasets", str(list_file), *flags, "--workers", "0"])
    return tmp_path / "shards"


def test_prints_counts_and_reasons(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_shards.main([str(shards), "--image-size", "28"]) == 0
    printed = capsys.readouterr().out
    assert "A | 9 | 0 | 0.5 | 9 | 3 |" in printed
    assert "B | 1 | 1 | 0.5 | 0 | 1 |" in printed
    assert "1 rejected: image: no such file" in printed


def test_the_page_marks_what_is_supervised_and_escapes_the_rest(shards: Path) -> None:
    assert inspect_shards.main([str(shards), "--image-size", "28"]) == 0
    page = (shards / "inspect.html").read_text()
    assert "<mark>yes &amp; no&lt;|im_end|&gt;</mark>" in page
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page.count("[image: 4 tokens]") == page.count("<img ") == 9


def test_a_folder_without_shards_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect_shards.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
