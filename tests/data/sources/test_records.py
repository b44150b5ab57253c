"""Annotation files of any size: the records that `json` would find, one at a time."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.sources import records
from megatron_gmai.data.sources.records import Records, read_record

VALUES: list[Any] = [
    {"a": 'µ " ] } \\ 漢'},
    [],
    12,
    -3.5e7,
    "text, [",
    None,
    True,
    {"b": [{"c": {}}]},
]


def all_records(file: Path) -> list[Any]:
    found = Records([file])
    return [read_record(file, int(s["start"]), int(s["size"])) for s in found.spans]


@pytest.mark.parametrize("chunk", [1, 3, 16, 2**22])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_list_is_read_whatever_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int, ascii_only: bool
) -> None:
    monkeypatch.setattr(records, "CHUNK", chunk)
    file = tmp_path / "data.json"
    file.write_text(json.dumps(VALUES, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert all_records(file) == VALUES


def test_json_lines_with_blank_lines_and_a_mark(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    lines = [
        json.dumps(value, ensure_ascii=False) for value in VALUES if not isinstance(value, list)
    ]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode() + b"\n")
    assert all_records(file) == [value for value in VALUES if not isinstance(value, list)]


@pytest.mark.parametrize("text", ["", "[]", " [ ] ", "\n\n"])
def test_files_without_records(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.json").write_text(text)
    assert len(Records([tmp_path / "data.json"])) == 0


def test_a_record_that_is_not_utf8_costs_only_itself(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_bytes(b'[{"a": "\xff"}, {"a": "b"}]')
    bad, good = Records([file]).spans
    with pytest.raises(BadSample, match="not valid JSON"):
        read_record(file, int(bad["start"]), int(bad["size"]))
    assert read_record(file, int(good["start"]), int(good["size"])) == {"a": "b"}


def test_gigantic_and_bottomless_records_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / "deep.jsonl"
    deep.write_text("  " + "[" * 100_000)
    monkeypatch.setattr(records, "MAX_RECORD", 1000)
    huge = tmp_path / "huge.jsonl"
    huge.write_text('"' + "x" * 2000 + '"')
    with pytest.raises(ValueError):
        all_records(deep)
    with pytest.raises(BadSample, match="more than 1000"):
        all_records(huge)


def test_a_line_of_gigabytes_is_one_record_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_scan", lambda file: [(0, 2**33, 1)])
    (span,) = Records([tmp_path / "huge.jsonl"]).spans
    assert span["size"] > records.MAX_RECORD
