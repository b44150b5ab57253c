"""Annotation files that are not what they should be: where exactly, and in one line."""

import bz2
import json
import time
from pathlib import Path

import pytest

from megatron_gmai.data.sources import records
from megatron_gmai.data.sources.records import Records, read_record
from tests.data.world import record

GOOD = record("what", "yes")
CHINESE = [record("这张图像显示什么？", f"左肺下叶有阴影 {n}") for n in range(5)]


def read_all(file: Path) -> list[object]:
    found = Records([file])
    return [read_record(file, int(s["start"]), int(s["size"])) for s in found.spans]


@pytest.mark.parametrize("chunk", [16, 2**22])
def test_positions_of_errors_are_those_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(records, "CHUNK", chunk)
    lines = ["[", *(json.dumps(GOOD) + "," for _ in range(40)), '{"a": nonsense},', "{}]"]
    text = "\n".join(lines)
    (tmp_path / "a.json").write_text(text)
    byte = text.index("nonsense")
    with pytest.raises(ValueError, match=rf"line 42 column 7 \(byte {byte}\)"):
        Records([tmp_path / "a.json"])


def test_positions_are_right_above_the_size_of_a_chunk(tmp_path: Path) -> None:
    text = "[\n" + (json.dumps(GOOD) + ",\n") * 60_000 + "{]"
    assert len(text) > records.CHUNK
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"line 60002 column 2 \(byte {len(text) - 1}\)"):
        Records([tmp_path / "a.json"])


@pytest.mark.parametrize("text", ["[{}, {}] [{}]", "[{}]\n{}", "[] x"])
def test_text_after_the_list_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="text after the list's closing"):
        Records([tmp_path / "a.json"])


@pytest.mark.parametrize("chunk", [1, 7, 2**22])
@pytest.mark.parametrize(
    "text",
    [
        '[{"a": [1, 2,], "b": ",]",}, {"c": 1},]',
        '[{"a": [1, 2], "b": ",]"},{"c": 1},\n]',
        '{"a": [1, 2,], "b": ",]",}\n{"c": 1,}',
    ],
)
def test_trailing_commas_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, chunk: int
) -> None:
    monkeypatch.setattr(records, "CHUNK", chunk)
    (tmp_path / "a.json").write_text(text)
    assert read_all(tmp_path / "a.json") == [{"a": [1, 2], "b": ",]"}, {"c": 1}]


@pytest.mark.parametrize(
    ("code", "name"),
    [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-32", "UTF-32"), ("gb18030", "GB18030")],
)
@pytest.mark.parametrize("lines", [True, False])
def test_an_encoding_is_named_once(tmp_path: Path, code: str, name: str, lines: bool) -> None:
    texts = [json.dumps(one, ensure_ascii=False) for one in CHINESE]
    text = "\n".join(texts) if lines else "[" + ",\n".join(texts) + "]"
    (tmp_path / "a.json").write_bytes(text.encode(code))
    with pytest.raises(ValueError, match=rf"a\.json is {name}.* not UTF-8"):
        Records([tmp_path / "a.json"])


@pytest.mark.parametrize("indent", [1, 4])
def test_objects_over_several_lines_are_one_error(tmp_path: Path, indent: int) -> None:
    text = "\n".join(json.dumps(GOOD, indent=indent) for _ in range(3))
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="objects over several lines"):
        Records([tmp_path / "a.json"])


def test_chinese_in_utf_8_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(CHINESE, ensure_ascii=False), encoding="utf-8")
    assert read_all(tmp_path / "a.json") == CHINESE


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"image,text\nok.jpg,lung\n", "no JSON objects, they begin with b'image,text"),
        (b"<!DOCTYPE html>\n<html></html>\n", "no JSON objects"),
        (b"PK\x03\x04 and so on", "a ZIP archive; unpack it"),
        (bz2.compress(b"{}"), "compressed with bzip2; unpack it"),
        (b"PAR1 and so on", "name it .parquet"),
        (json.dumps({"data": [GOOD]}).encode(), "one object with a list under 'data'"),
        ("\n".join(['{"a": "Übersicht, "}'] * 9).encode("latin-1"), "ISO-8859-1 .*not UTF-8"),
    ],
)
def test_another_format_is_one_error(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=told):
        Records([tmp_path / "a.json"])


def test_an_encoding_that_is_not_certain_is_not_told_as_one(tmp_path: Path) -> None:
    text = json.dumps([record("これは何ですか", "胸部レントゲン写真です")], ensure_ascii=False)
    (tmp_path / "a.json").write_bytes(text.encode("shift_jis"))
    with pytest.raises(ValueError, match=r"GB18030 \(GBK\) or Shift JIS or ISO.*look at"):
        Records([tmp_path / "a.json"])


def test_a_text_that_is_cut_off_takes_no_time(tmp_path: Path) -> None:
    """Looking for commas took minutes: each quote was tried as the beginning of a string."""
    text = json.dumps([record("what", '"' * 200_000)])
    (tmp_path / "a.json").write_text(text[:-200])
    begin = time.monotonic()
    with pytest.raises(ValueError, match="not valid JSON"):
        Records([tmp_path / "a.json"])
    assert time.monotonic() - begin < 5
