"""Predictions go to VLMEvalKit's three file formats and come back as they were."""

import json
import zipfile
from pathlib import Path

import openpyxl
import pandas
import pytest

from megatron_gmai.evaluate.benchmarks import predictions
from megatron_gmai.evaluate.benchmarks.predictions import read_predictions, write_predictions
from megatron_gmai.evaluate.benchmarks.table import Benchmark, read_benchmark
from tests.evaluate.tables import choices, write_tsv

ANSWERS = {
    "0": "B",
    "1": "=SUM(A1)",
    "2": 'a "b"\tc\nd',
    "3": "None",
    "4": "",
    "5": "肺 1e3",
}


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    return read_benchmark(write_tsv(tmp_path / "Set.tsv", choices(6, category="x")))


@pytest.mark.parametrize("suffix", ["tsv", "json", "xlsx"])
def test_answers_come_back_as_they_were(benchmark: Benchmark, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "out" / f"model_Set.{suffix}"
    write_predictions(path, benchmark, ANSWERS)
    assert read_predictions(path) == ANSWERS


@pytest.mark.parametrize("suffix", ["tsv", "json", "xlsx"])
def test_pandas_reads_what_vlmevalkit_needs(
    benchmark: Benchmark, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"model_Set.{suffix}"
    write_predictions(path, benchmark, ANSWERS)
    readers = {
        "tsv": lambda: pandas.read_csv(path, sep="\t"),
        "json": lambda: pandas.DataFrame(json.loads(path.read_text())),
        "xlsx": lambda: pandas.read_excel(path),
    }
    table = readers[suffix]()
    assert list(table["index"]) == [0, 1, 2, 3, 4, 5]
    assert {"question", "A", "B", "C", "D", "answer", "category"} <= set(table.columns)
    assert "image" not in table and str(table["prediction"][1]) == "=SUM(A1)"


@pytest.mark.parametrize("suffix", ["tsv", "json", "xlsx"])
@pytest.mark.parametrize("index", ["007", "1234567890123456789"])
def test_indices_that_a_number_would_change_stay_texts(
    tmp_path: Path, suffix: str, index: str
) -> None:
    rows = [dict(row, index=index) for row in choices(1)]
    path = tmp_path / f"p.{suffix}"
    write_predictions(path, read_benchmark(write_tsv(tmp_path / "Set.tsv", rows)), {index: "B"})
    assert read_predictions(path) == {index: "B"}


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('[{"index": 0, "prediction": "A"}]', encoding="utf-8-sig")
    assert read_predictions(tmp_path / "p.json") == {"0": "A"}


def test_characters_that_a_workbook_cannot_hold_are_left_out(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    path = tmp_path / "p.xlsx"
    write_predictions(path, benchmark, ANSWERS | {"0": "a\x00\x0bb"})
    assert read_predictions(path)["0"] == "ab"


def test_only_answered_rows_are_written_in_the_benchmarks_order(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    path = tmp_path / "p.json"
    write_predictions(path, benchmark, {"3": "x", "1": "y"})
    assert [record["index"] for record in json.loads(path.read_text())] == [1, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "index,prediction", "known are"),
        ("p.tsv", "index\tanswer\n1\tx\n", "without index or prediction"),
        ("p.tsv", "index\tprediction\n1\tx\n1\ty\n", "stands there twice"),
        ("p.json", "{}", "list of objects"),
        ("p.json", "[1]", "list of objects"),
        ("p.json", "[", "not JSON"),
        ("p.json", '[{"index": "1", "prediction": "\\ud800"}]', "not valid Unicode"),
        ("p.xlsx", "no workbook", "not a workbook"),
    ],
)
def test_files_that_hold_no_predictions_are_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_predictions(tmp_path / name)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('<row r="2000000000"><c r="A2000000000"><v>1</v></c></row>', "without index"),
        ("<row/>" * 20_000, "when unpacked"),
    ],
)
def test_a_small_workbook_may_not_unpack_without_end(
    rows: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "MAX_UNPACKED_BYTES", 100_000)
    openpyxl.Workbook().save(tmp_path / "empty.xlsx")
    head = '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">'
    sheet = f"{head}<sheetData>{rows}</sheetData></worksheet>"
    with (
        zipfile.ZipFile(tmp_path / "empty.xlsx") as empty,
        zipfile.ZipFile(tmp_path / "p.xlsx", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in empty.namelist():
            archive.writestr(name, sheet if "sheet1" in name else empty.read(name))
    with pytest.raises(ValueError, match=message):
        read_predictions(tmp_path / "p.xlsx")


def test_a_missing_file_and_an_unknown_format_are_told(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="cannot read predictions"):
        read_predictions(tmp_path / "none.tsv")
    with pytest.raises(ValueError, match="must end in"):
        write_predictions(tmp_path / "p.csv", benchmark, {})
