"""Benchmarks' tables are read for what they say, and nothing in them is run or followed outside."""

import base64
import tracemalloc
from pathlib import Path

import pandas
import pytest

from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.evaluate.benchmarks.cells import split_cell
from megatron_gmai.evaluate.benchmarks.pandas_numbers import read_column
from megatron_gmai.evaluate.benchmarks.table import read_benchmark
from megatron_gmai.evaluate.benchmarks.write import Row, TableWriter
from tests.evaluate.tables import OPTIONS, cell, choices, encoded, png, write_tsv


def row(index: int | str, image: object, **more: object) -> dict[str, object]:
    return {"index": index, "image": image, "question": f"q{index}", **more}


def test_rows_become_questions_with_their_options_and_columns(tmp_path: Path) -> None:
    rows = choices(6, images=2, Department="radiology")
    benchmark = read_benchmark(write_tsv(tmp_path / "Set.tsv", rows))
    assert (benchmark.name, len(benchmark.items)) == ("Set", 6)
    second = benchmark.items[1]
    assert (second.index, second.answer, second.options) == ("1", "B", OPTIONS)
    assert second.columns == {"department": "radiology"}
    assert [benchmark.images(one) for one in benchmark.items[:2]] == [[png(0)], [png(1)]]


def test_a_short_image_cell_means_the_image_of_another_row(tmp_path: Path) -> None:
    benchmark = read_benchmark(write_tsv(tmp_path / "s.tsv", choices(5, images=2)))
    assert benchmark.images(benchmark.items[4]) == [png(0)]
    keys = [one.image_key for one in benchmark.items]
    assert keys[4] == keys[2] == keys[0] != keys[1] == keys[3]


def test_a_list_literal_is_several_images(tmp_path: Path) -> None:
    both = repr([cell(png(1)), cell(png(2))])
    benchmark = read_benchmark(write_tsv(tmp_path / "s.tsv", [row(0, both)]))
    assert benchmark.images(benchmark.items[0]) == [png(1), png(2)]


@pytest.mark.parametrize(
    "image",
    [
        "[__import__('pathlib').Path('made').touch(), " + "'a' * 70]",
        "[" + "1, " * 40 + "]",
        "[" * 200 + "]" * 200,
        "[{{}}]",
        "['x' 'y']",
        "['x\\ud800\\']",
        "[" + ", ".join(["'x'"] * 65) + "]",
        "not base64, and longer than any reference to another row could ever be, so it is one",
        "77",
    ],
)
def test_what_is_no_image_is_a_reason_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str
) -> None:
    monkeypatch.chdir(tmp_path)
    benchmark = read_benchmark(write_tsv(tmp_path / "s.tsv", [row(0, image)]))
    with pytest.raises(BadSample):
        benchmark.images(benchmark.items[0])
    assert not (tmp_path / "made").exists()


def test_a_long_list_takes_no_memory_but_its_own() -> None:
    cell = "[" + "'a'," * 250_000 + "]"
    tracemalloc.start()
    with pytest.raises(BadSample, match="more than 64 images"):
        split_cell(cell)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(cell)


def test_texts_of_a_list_may_hold_quotes_commas_and_escapes() -> None:
    names = ["a, b.png", "it's", 'say "x"', "back\\slash\n", "肺"]
    assert split_cell(repr(names)) == names
    assert split_cell("[ 'a' ,\"b\" , ]") == ["a", "b"]


def test_what_pandas_takes_for_missing_is_text_here(tmp_path: Path) -> None:
    image = cell(png())
    rows = [row(0, image, A="None", B="NA", C="", D="1", answer="None"), row(1, image, D="2.50")]
    first, second = read_benchmark(write_tsv(tmp_path / "s.tsv", rows)).items
    assert first.options == {"A": "None", "B": "NA", "D": "1"} and first.answer == "None"
    assert second.options == {"D": "2.50"}


def test_rows_without_an_image_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [row(0, cell(png())), row(1, "")]
    benchmark = read_benchmark(write_tsv(tmp_path / "s.tsv", rows))
    assert [one.index for one in benchmark.items] == ["0"] and benchmark.without_image == 1


def test_cells_that_a_short_row_lacks_are_empty(tmp_path: Path) -> None:
    path = tmp_path / "s.tsv"
    path.write_text("image\tindex\tquestion\tA\nx.png\t7\n")
    (item,) = read_benchmark(path).items
    assert (item.index, item.question, item.options) == ("7", "", {})


@pytest.mark.parametrize("rows", ['0\t"what\n1\tq\tA\tx\n', "0\tone\ttwo\tA\tx.png\n"])
def test_rows_that_have_run_into_one_or_into_the_next_column_are_refused(
    tmp_path: Path, rows: str
) -> None:
    path = tmp_path / "s.tsv"
    path.write_text(f"index\tquestion\tanswer\timage\n{rows}")
    with pytest.raises(ValueError, match="cells, the header 4; is a quote not closed"):
        read_benchmark(path)


def test_base64_in_lines_is_read_and_a_reference_to_a_file_is_none(tmp_path: Path) -> None:
    lines = base64.encodebytes(png()).decode()
    rows = [row(0, lines), row(1, "", image_path="x.png"), row(2, "1")]
    benchmark = read_benchmark(write_tsv(tmp_path / "s.tsv", rows))
    assert benchmark.images(benchmark.items[0]) == [png()]
    with pytest.raises(BadSample, match="none in its image cell"):
        benchmark.images(benchmark.items[2])


def test_cells_may_hold_tabs_quotes_and_line_ends(tmp_path: Path) -> None:
    text = 'a "b"\tc\nd\u2028e ä 肺'
    rows = [row(0, cell(png(1)), hint=text), row(1, cell(png(2)), hint="plain")]
    benchmark = read_benchmark(write_tsv(tmp_path / "s.tsv", rows))
    assert [one.hint for one in benchmark.items] == [text, "plain"]
    assert [benchmark.images(one) for one in benchmark.items] == [[png(1)], [png(2)]]


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "s.tsv", [row(0, cell(png(1)), A="x"), row(1, cell(png(2)))])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    benchmark = read_benchmark(path)
    assert benchmark.items[0].options == {"A": "x"}
    assert benchmark.images(benchmark.items[1]) == [png(2)]


def test_images_in_files_are_read_below_the_benchmarks_folder_only(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(9))
    folder = tmp_path / "data"
    (folder / "images" / "Set").mkdir(parents=True)
    (folder / "images" / "Set" / "a.png").write_bytes(png(1))
    (folder / "b.png").write_bytes(png(2))
    names = ["a.png", "['a.png', 'b.png']", "../secret.png", str(tmp_path / "secret.png"), "no.png"]
    rows = [{"index": i, "image_path": name, "question": "q"} for i, name in enumerate(names)]
    benchmark = read_benchmark(write_tsv(folder / "Set_local.tsv", rows))
    assert benchmark.name == "Set"
    assert benchmark.images(benchmark.items[0]) == [png(1)]
    assert benchmark.images(benchmark.items[1]) == [png(1), png(2)]
    for one in benchmark.items[2:]:
        with pytest.raises(BadSample):
            benchmark.images(one)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"question\nq\n", "needs the columns"),
        (b"", "needs the columns"),
        (b"index\tquestion\timage\n1\tq\t2\n1\tq\t2\n", "the same index"),
        (b"index\tquestion\timage\n1\tq\t\n", "no question with an image"),
        (b"index\tquestion\timage\n1\t\xff\xfe\tx\n", "not a TSV file"),
    ],
)
def test_a_file_that_is_no_benchmark_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "s.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_benchmark(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read benchmark"):
        read_benchmark(tmp_path / "none.tsv")


@pytest.mark.parametrize(
    ("name", "circular"),
    [
        ("MMBench_DEV", True),
        ("CCBench", True),
        ("my_circular_set", True),
        ("GMAI-MMBench_VAL", False),
        ("SLAKE", False),
    ],
)
def test_a_set_is_circular_by_its_name(tmp_path: Path, name: str, circular: bool) -> None:
    path = write_tsv(tmp_path / f"{name}.tsv", choices(1))
    assert read_benchmark(path).circular is circular


def test_deep_images_are_windowed_as_in_training(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    deep = np.linspace(0, 60_000, 64 * 64).astype(np.uint16).reshape(64, 64)
    image = cell(encoded(Image.fromarray(deep)))
    benchmark = read_benchmark(write_tsv(tmp_path / "s.tsv", [row(0, image)]))
    pixels = decode(benchmark.images(benchmark.items[0])[0])
    assert pixels.shape == (64, 64, 3) and len(np.unique(pixels)) > 200


def test_what_is_written_is_read_back_and_images_are_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "out" / "Set.tsv"
    with TableWriter(path, ["modality"], options=2) as table:
        table.add(Row("q\t1", "A", [png(1)], ["None", "b"], columns={"modality": "CT"}))
        table.add(Row("q2", "yes", [png(1)], hint="h"))
        table.add(Row("q3", "yes", [png(1), png(2)]))
        assert table.seen_as_missing == 1
        assert not path.exists()
    benchmark = read_benchmark(path)
    first, second, third = benchmark.items
    assert (first.question, first.options, first.columns) == (
        "q\t1",
        {"A": "None", "B": "b"},
        {"modality": "CT"},
    )
    assert (second.hint, second.options) == ("h", {})
    assert benchmark.images(second) == [png(1)] and benchmark.images(third) == [png(1), png(2)]
    assert path.read_text().count(cell(png(1))) == 2
    assert [file.name for file in path.parent.iterdir()] == ["Set.tsv"]


def test_a_table_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="3 options"),
        TableWriter(tmp_path / "Set.tsv", [], options=2) as table,
    ):
        table.add(Row("q", "A", [png()], ["a", "b", "c"]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "cells",
    [
        ["1", "2", "3"],
        ["1", "", "3"],
        ["1", "NA", "2.50"],
        ["007", "-2", "+4"],
        ["1e3", ".5", "2."],
        ["1", "two", ""],
        ["", "", ""],
        ["12345678901234567890123", "1", "2"],
    ],
)
def test_columns_of_numbers_read_as_pandas_reads_them(tmp_path: Path, cells: list[str]) -> None:
    file = write_tsv(tmp_path / "x.tsv", [{"row": n, "A": cell} for n, cell in enumerate(cells)])
    read = pandas.read_csv(file, sep="\t")["A"]
    expected = [
        cell if missing else str(value)
        for cell, value, missing in zip(cells, read, read.isna(), strict=True)
    ]
    assert read_column(cells) == expected
