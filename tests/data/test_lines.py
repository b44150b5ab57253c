"""Lines that wait for space on a full disk."""

import resource
from pathlib import Path

import pytest

from megatron_gmai.data.files import Lines

FULL = Path("/dev/full")  # takes no byte: "No space left on device"


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_lines_wait_in_order_until_there_is_space(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines(FULL)
    lines.add(["one\n"])
    lines.add(["two\n", "three\n"])
    assert capsys.readouterr().out.count("warning: /dev/full: [Errno 28]") == 1
    lines.path = tmp_path / "lines"
    lines.add(["four\n"])
    lines.add([])
    assert lines.path.read_text() == "one\ntwo\nthree\nfour\n"


def test_a_line_that_fits_in_part_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines(tmp_path / "lines")
    lines.add(["first\n"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        lines.add(["second\n"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert lines.path.read_text() == "first\n"
    assert "wait in memory" in capsys.readouterr().out
    lines.add(["third\n"])
    assert lines.path.read_text() == "first\nsecond\nthird\n"


def test_nothing_makes_no_file(tmp_path: Path) -> None:
    Lines(tmp_path / "lines").add([])
    assert not (tmp_path / "lines").exists()
