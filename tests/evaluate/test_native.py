"""Benchmarks from the files that they are published in, one small set in each layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.sources import parquet
from megatron_gmai.evaluate.benchmarks.table import Benchmark, read_benchmark
from megatron_gmai.evaluate.native.files import read_json_list, read_parquet, texts_of
from megatron_gmai.evaluate.native.mmmu import SUBJECTS
from megatron_gmai.evaluate.native.registry import SOURCES
from tests.evaluate import published
from tests.evaluate.tables import png
from tools.make_benchmark import main


@pytest.fixture
def make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Benchmark, str]]:
    """Converts `tmp_path/native` and gives the benchmark and what was printed."""

    def run(name: str, *flags: str) -> tuple[Benchmark, str]:
        words = [name, "--source", str(tmp_path / "native"), "--output", str(tmp_path / "out")]
        assert main([*words, *flags]) == 0
        (path,) = (tmp_path / "out").glob("*.tsv")
        return read_benchmark(path), capsys.readouterr().out

    return run


Make = Callable[..., tuple[Benchmark, str]]


def test_vqa_rad_of_the_authors(tmp_path: Path, make: Make) -> None:
    published.image(tmp_path / "secret.png", 3)
    published.vqa_rad_of_the_authors(tmp_path / "native")
    benchmark, said = make("vqa-rad")
    closed, opened = benchmark.items
    assert (closed.question, closed.answer) == ("Is there a mass?", "Yes")
    assert closed.columns == {
        "id": "1",
        "answer_type": "CLOSED",
        "question_type": "PRES",
        "organ": "CHEST",
        "phrase_type": "test_freeform",
    }
    assert (opened.answer, opened.columns["answer_type"]) == ("12", "OPEN")
    assert benchmark.images(opened) == [png(1)]
    assert "papers count 451" in said and "1 rejected; VQA-RAD/3: image" in said
    assert "outside" in (tmp_path / "out" / "VQA-RAD.rejected.jsonl").read_text()


@pytest.mark.parametrize(("name", "count"), [("vqa-rad", 451), ("pathvqa", 6719)])
def test_the_hubs_copies_of_vqa_rad_and_path_vqa(
    tmp_path: Path, make: Make, name: str, count: int
) -> None:
    published.image_question_answer(tmp_path / "native")
    benchmark, said = make(name)
    assert [(one.answer, one.columns["answer_type"]) for one in benchmark.items] == [
        ("no", "CLOSED"),
        ("a mass", "OPEN"),
    ]
    assert benchmark.images(benchmark.items[1]) == [png(1)]
    assert f"papers count {count}" in said and "not an image" in said


def test_slake_in_all_languages_and_in_one(tmp_path: Path, make: Make) -> None:
    published.slake(tmp_path / "native")
    benchmark, said = make("slake")
    assert [one.columns["language"] for one in benchmark.items] == ["en", "zh"]
    assert benchmark.items[1].question == "图中是肺吗?"
    assert benchmark.items[0].columns["modality"] == "X-Ray" and "papers count 2094" in said
    benchmark, said = make("slake", "--language", "en")
    assert len(benchmark.items) == 1 and "papers" not in said


def test_pmc_vqa_second_version(tmp_path: Path, make: Make) -> None:
    published.pmc_vqa_2(tmp_path / "native")
    benchmark, said = make("pmc-vqa")
    (one,) = benchmark.items
    assert one.options == {"A": "CT", "B": "MRI", "C": "a:b", "D": "None"} and one.answer == "B"
    assert benchmark.images(one) == [png(1)]
    assert "2 rejected" in said and 'read "None"' in said


def test_pmc_vqa_first_version(tmp_path: Path, make: Make) -> None:
    published.pmc_vqa_1(tmp_path / "native")
    (one,) = make("pmc-vqa", "--split", "test")[0].items
    assert (one.answer, one.options["C"]) == ("C", "US")


def test_omnimedvqa(tmp_path: Path, make: Make) -> None:
    published.omnimedvqa(tmp_path / "native")
    benchmark, said = make("omnimedvqa")
    first, second = benchmark.items
    assert (first.answer, len(first.options), len(second.options)) == ("B", 4, 2)
    assert first.columns["modality"] == second.columns["modality"] == "CT"
    assert first.columns["question_type"] == "Modality Recognition"
    assert "1 rejected; OmniMedVQA/Chest_CT_2: the answer 'PET' is none of the options" in said


def test_mmmu_takes_the_five_subjects(tmp_path: Path, make: Make) -> None:
    published.mmmu(tmp_path / "native", SUBJECTS)
    published.mmmu(tmp_path / "native", ["Art"])
    benchmark, said = make("mmmu_health_medicine")
    assert len(benchmark.items) == 10 and "papers count 150" in said
    choice, opened = benchmark.items[:2]
    assert choice.options == {"A": "<image 1>", "B": "the second's"}
    assert benchmark.images(choice) == [png(0), png(50)]
    assert (opened.answer, opened.options) == ("['3', 'three']", {})
    assert {one.columns["category"] for one in benchmark.items} == set(SUBJECTS)


def test_gmai_mmbench_keeps_its_letters_and_groups(tmp_path: Path, make: Make) -> None:
    published.gmai_mmbench(tmp_path / "native")
    benchmark, said = make("gmai-mmbench", "--name", "GMAI-MMBench_VAL")
    assert [one.columns["id"] for one in benchmark.items] == ["11", "12"]
    second = benchmark.items[1]
    assert second.options == {"A": "CT", "B": "MR", "D": "None"} and second.answer == "D"
    assert second.columns["clinical vqa task"] == "Disease Diagnosis"
    assert not benchmark.circular and "4 options or answers" not in said


def test_the_parts_of_gmai_mmbenchs_test_are_joined_in_order(tmp_path: Path, make: Make) -> None:
    published.gmai_mmbench(tmp_path / "native")
    benchmark, _ = make("gmai-mmbench", "--split", "GMAI_mm_bench_TEST")
    assert [one.columns["id"] for one in benchmark.items] == ["100", "200", "1000"]
    assert [one.answer for one in benchmark.items] == ["", "", ""]


@pytest.mark.parametrize("name", list(SOURCES))
def test_an_empty_folder_gets_one_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [name, "--source", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("make_benchmark: ") and len(error.splitlines()) == 1
    assert not list((tmp_path / "out").glob("*"))


def test_a_set_without_a_usable_question_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published.slake(tmp_path)
    words = ["slake", "--source", str(tmp_path), "--output", str(tmp_path), "--language", "fr"]
    assert main(words) == 2
    assert "no question of" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "[1]", "[", "\x00"])
def test_damaged_annotations_are_told(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test.json").write_text(content)
    assert main(["slake", "--source", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "test.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("records", "said"),
    [([{}, 7], "element 1 .* is a number"), ({}, "not an object"), ([None], "element 0 .* null")],
)
def test_a_bad_element_is_told_by_its_place(tmp_path: Path, records: Any, said: str) -> None:
    (tmp_path / "held_out.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=said):
        read_json_list(tmp_path / "held_out.json")


def test_a_record_that_is_no_unicode_costs_no_other(tmp_path: Path, make: Make) -> None:
    published.slake(tmp_path / "native")
    file = tmp_path / "native" / "test.json"
    first, second = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps([first | {"answer": "\ud800"}, second]))
    benchmark, said = make("slake")
    assert len(benchmark.items) == 1 and "SLAKE/1: not valid Unicode" in said


@pytest.mark.parametrize("literal", ["[{{}}]", "[" * 1000, "7"])
def test_options_that_are_no_list_are_a_reason(literal: str) -> None:
    with pytest.raises(BadSample, match="not a list"):
        texts_of(literal)


def test_a_small_parquet_file_may_not_unpack_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pyarrow.DictionaryArray.from_arrays([0] * 64, [bytes(2**20)])
    file = tmp_path / "test-0.parquet"
    table = pyarrow.table({"image": image})
    pyarrow.parquet.write_table(table, file, compression="zstd", store_schema=False)
    monkeypatch.setattr(parquet, "LEAST_BOUND", 2**22)
    with pytest.raises(ValueError, match=r"test-0\.parquet: it unpacks to more than 4194304"):
        list(read_parquet([file]))
