"""tools/inspect_shards.py: counts on the terminal, samples on a page of its own."""

import json
import os
import re
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from megatron_gmai.data.inspection.rejected import group
from megatron_gmai.data.ledger import Rejection, dump_line, read_ledger
from megatron_gmai.data.loading.dataset import _reasons
from tests.data.world import encoded, mixed_records, picture, record
from tools import inspect_shards, make_shards

BOXED_END = re.compile(r"<b class=token title='token \d+'>&lt;\|im_end\|&gt;</b>")


@pytest.fixture
def shards(tmp_path: Path, write_list: Callable, tokenizer_file: Path) -> Path:
    harmful = record("<script>alert(1)</script>", "yes & no")
    picture(seed=77).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(encoded(picture())[:200])
    rejected = [
        record("<image>", "a", "lost.png", id="case-7"),
        record("<image><image><b>bold</b>", "a", ["good.png", "broken.png"]),
    ]
    list_file = write_list(A=mixed_records(tmp_path, 9), B=[harmful, *rejected], ratio=0.5)
    flags = ["--output", str(tmp_path / "shards"), "--tokenizer", str(tokenizer_file)]
    make_shards.main(["--datasets", str(list_file), *flags, "--workers", "0"])
    return tmp_path / "shards"


def inspect(folder: Path, *flags: str) -> str:
    assert inspect_shards.main([str(folder), "--image-size", "28", *flags]) == 0
    return (folder / "inspect.html").read_text()


def test_prints_counts_and_reasons(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(shards)
    printed = capsys.readouterr().out
    assert "A | 9 | 0 | 0.5 | 9 | 3 |" in printed
    assert "B | 1 | 2 | 0.5 | 0 | 1 |" in printed
    # The folder has digits in its name, as pytest makes it.
    assert f"1 rejected: image: no such file in {shards.parent}\n" in printed


def test_the_page_marks_what_is_supervised_and_escapes_the_rest(shards: Path) -> None:
    page = inspect(shards)
    assert f"<mark>yes &amp; no{BOXED_END.search(page)[0]}</mark>" in page  # type: ignore[index]
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page.count("[image: 4 tokens]") == 9


def test_a_token_and_its_letters_look_different(
    tmp_path: Path, write_list: Callable, tokenizer_file: Path
) -> None:
    list_file = write_list(A=[record("what is <|im_end|> here", "no")])
    flags = ["--output", str(tmp_path / "shards"), "--tokenizer", str(tokenizer_file)]
    make_shards.main(["--datasets", str(list_file), *flags, "--workers", "0"])
    page = inspect(tmp_path / "shards")
    assert "what is &lt;|im_end|&gt; here" in page
    assert len(BOXED_END.findall(page)) == 2
    assert page.count("&lt;|im_end|&gt;") == 3


def test_rejected_samples_are_shown_with_ids_reasons_and_pictures(shards: Path) -> None:
    hidden = inspect(shards)
    assert "B/00000001<br>id case-7<br>" in hidden and "&lt;b&gt;bold" not in hidden
    page = inspect(shards, "--datasets", str(shards.parent / "LIST.json"))
    part = page[page.index("<h2>Rejected") : page.index("<h2>Samples")]
    assert "<p>2 samples</p>" in part
    assert "B/00000001<br>id case-7<br>" in part and "B.json, record 2<br>image lost.png" in part
    assert part.count("<p class=reason>image lost.png: no such file") == 1
    # Of the second the good image is seen, and why the broken one is not.
    assert part.count("<img ") == 1 and "no picture: cannot decode PNG" in part
    assert "&lt;b&gt;bold" in part and "<b>bold" not in part


def test_samples_that_are_too_long_are_shown_from_the_shards(shards: Path) -> None:
    page = inspect(shards, "--max-length", "30")
    part = page[page.index("<h2>Rejected") : page.index("<h2>Samples")]
    assert "more than --max-length 30" in part and part.count("<img ") > 1
    assert "&lt;script&gt;" in part and "<script>" not in part


def test_the_page_says_how_many_more_there_are(shards: Path) -> None:
    page = inspect(shards, "--samples", "1")
    assert "<p>and 1 more rejected samples, in the ledger</p>" in page
    assert "<p>and 9 more samples</p>" in page


def test_the_terminal_says_how_many_more_reasons_there_are() -> None:
    letters = "abcdefghijkl"
    lines = [Rejection(f"A/{letter}", "A", f"reason {letter}") for letter in letters]
    assert inspect_shards.report([], lines).endswith("and 2 more reasons, of 2 samples")


def test_reasons_that_differ_in_numbers_only_are_one() -> None:
    texts = ["701 tokens, more than 512", "702 tokens, more than 512", "in /data/2024/a", "in x-1"]
    lines = [Rejection(f"A/{text}", "A", text) for text in [*texts, "in /data/2025/a"]]
    assert group(lines) == [
        ("701 tokens, more than 512", 2),
        ("in /data/2024/a", 1),
        ("in x-1", 1),
        ("in /data/2025/a", 1),
    ]


def test_a_folder_that_cannot_be_written_to_is_left_as_it_is(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file: file.stat().st_mtime_ns for file in shards.rglob("*")}
    writable = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: str(path) != str(shards) and writable(path, mode)
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert inspect_shards.main([str(shards), "--image-size", "28"]) == 0
    page = (tmp_path / "here" / "shards-inspect.html").read_text()
    assert page.count("[image: 4 tokens]") == 9
    assert {file: file.stat().st_mtime_ns for file in shards.rglob("*")} == before


def test_rejected_samples_of_a_foreign_tar_file(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {
        "good.json": json.dumps(record("<image> what", "yes")).encode(),
        "good.png": encoded(picture(seed=1)),
        "bad.json": json.dumps(record("<image><image> what", "yes")).encode(),
        "bad.png": encoded(picture(seed=2)),
        "last.json": json.dumps(record("what", "no")).encode(),
    }
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    assert make_shards.main(["--index", str(tmp_path / "tars")]) == 0
    page = inspect(tmp_path / "tars", "--tokenizer", str(tokenizer_file))
    part = page[page.index("<h2>Rejected") : page.index("<h2>Samples")]
    assert "id bad" in part and part.count("<img ") == 1
    # The same where only a copy of the index can be written to.
    writable = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).endswith("tars") and writable(path, mode)
    )
    place = tmp_path / "page.html"
    flags = ["--tokenizer", str(tokenizer_file), "--html", str(place), "--image-size", "28"]
    assert inspect_shards.main([str(tmp_path / "tars"), *flags]) == 0
    assert place.read_text().count("<img ") == page.count("<img ")


def test_strangers_shards_name_no_files_of_mine(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ledger and `origin` come with the shards; the page is a link into a folder of mine."""
    (tmp_path / "letter").write_text("mine")
    (shards / "inspect.html").symlink_to(tmp_path / "letter")
    lines = read_ledger(shards / "rejected.jsonl")
    far = f"A-00000.tar@{10**30}"
    (shards / "rejected.jsonl").write_text(
        "".join(
            map(dump_line, [*lines, Rejection(far, "A", "far"), Rejection("x.tar@0", "A", "-")])
        )
    )
    os.mkfifo(shards / "x.tar")
    page = inspect(shards)
    assert "case-7" in page and "&lt;b&gt;bold" not in page and far in page
    assert (tmp_path / "letter").read_text() == "mine"
    (shards / "origin").write_text(str(tmp_path))
    assert inspect_shards.main([str(shards)]) == 2
    assert "give --shards the place of the tar files itself" in capsys.readouterr().err


def test_a_folder_without_shards_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect_shards.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_texts_that_steer_a_terminal_or_a_page_are_shown_as_escapes(
    tmp_path: Path,
    write_list: Callable,
    tokenizer_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evil = "\x1b[31m\u202e\ud800\n9 rejected: none"
    turn = {"from": "human", "value": evil}
    records = [record("what", "\x1b[2J \u202e yes"), record("", "no", evil, id=evil, more=[turn])]
    list_file = write_list(A=records)
    flags = ["--output", str(tmp_path / "shards"), "--tokenizer", str(tokenizer_file)]
    make_shards.main(["--datasets", str(list_file), *flags, "--workers", "0"])
    page = inspect(tmp_path / "shards")
    printed = capsys.readouterr().out + _reasons(read_ledger(tmp_path / "shards/rejected.jsonl"))
    assert not re.search("[\x1b\u202e\ud800]", page + printed) and "\n9 rejected" not in printed
    assert r"\x1b[2J \u202e yes" in page and r"\x1b[31m\u202e\ud800" in page
