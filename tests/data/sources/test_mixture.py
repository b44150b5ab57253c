"""The list file: accepted as published, refused with all problems at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gmai.data.sources.mixture import Use, read_list, read_uses


def write(folder: Path, text: str) -> Path:
    (folder / "LIST.json").write_text(text)
    return folder / "LIST.json"


def entry(**changes: Any) -> dict[str, Any]:
    return {"image_dir": "", "annotations": "a.json", "sample_ratio": 0.5, "length": 1, **changes}


def test_the_published_form_with_its_trailing_comma_warns_and_works(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "example_data.json").write_text("[]")
    text = """{
    "FILE1, }": {
        "image_dir": "",
        "annotations": "examples/example_data.json",
        "sample_ratio": 1.0,
        "length": 38276,
        "data_augment": true
    },
}"""
    with pytest.warns(UserWarning, match="1 trailing comma"):
        (source,) = read_list(write(tmp_path / "examples", text))
    assert source.name == "FILE1, }"
    assert source.data_augment and source.sample_ratio == 1.0
    assert [file.name for file in source.annotation_files] == ["example_data.json"]


def test_a_folder_of_annotations_is_read_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "many" / "deep").mkdir(parents=True)
    for name in ("b.json", "a.jsonl", "deep/c.json", "notes.txt"):
        (tmp_path / "many" / name).write_text("")
    (source,) = read_list(write(tmp_path, json.dumps({"A": entry(annotations="many")})))
    assert [file.name for file in source.annotation_files] == ["a.jsonl", "b.json", "c.json"]


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    entries = {
        "A": entry(sample_ratio=-1),
        "B": entry(annotations="lost.json"),
        "C": 3,
        "D": entry(image_dir="/no/such/folder"),
        "E": entry(sample_ratio="half"),
        "F": entry(sample_ratio=float("nan")),
    }
    with pytest.raises(ValueError) as error:
        read_list(write(tmp_path, json.dumps(entries)))
    message = str(error.value)
    for part in (
        "A: 'sample_ratio'",
        "B: annotations 'lost.json'",
        "C: ",
        "D: 'image_dir'",
        "E: 'sample_ratio'",
        "F: 'sample_ratio'",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("{}", "one data set or more"),
        ("[1]", "JSON object"),
        ('{"A": ', "not valid JSON"),
        ('{"A": 1,,}', "not valid JSON"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_list(write(tmp_path, text))


def test_a_missing_list_is_named_with_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.json; give --datasets"):
        read_list(tmp_path / "no.json")


def test_ratios_can_be_read_without_the_annotations(tmp_path: Path) -> None:
    assert read_uses(write(tmp_path, json.dumps({"A": entry()}))) == {"A": Use(0.5, False)}
