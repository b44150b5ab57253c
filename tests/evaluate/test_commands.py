"""tools/evaluate.py score, compare and leakage, from files to files."""

import json
from pathlib import Path

import pytest

from megatron_gmai.evaluate.benchmarks.predictions import write_predictions
from megatron_gmai.evaluate.benchmarks.table import read_benchmark
from megatron_gmai.evaluate.report import questions_hash
from tests.evaluate.tables import choices, png, write_tsv
from tests.evaluate.test_leakage import make_shards
from tools.evaluate import main


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    return write_tsv(tmp_path / "Set.tsv", choices(40, images=10, modality="CT"))


def predicted(benchmark: Path, name: str, answers: dict[int, str]) -> Path:
    """All questions answered rightly but for `answers`."""
    path = benchmark.with_name(f"{name}_Set.tsv")
    table = read_benchmark(benchmark)
    said = {one.index: answers.get(int(one.index), one.answer) for one in table.items}
    write_predictions(path, table, said)
    return path


def test_score_prints_a_row_a_protocol_and_writes_result_and_page(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = predicted(benchmark, "model", {0: "B", 1: "<script>alert(1)</script>"})
    files = [tmp_path / "result.json", tmp_path / "page.html"]
    words = ["score", "--benchmark", str(benchmark), "--predictions", str(predictions)]
    main([*words, "--output", str(files[0]), "--html", str(files[1])])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:2] == ["vlmevalkit", "0.9500"]
    assert lines[2].split()[-4:] == ["40", "1", "0", "0"]
    assert "no rule for these questions: llava-med, lmms-eval" in lines
    result = json.loads(files[0].read_text())
    assert result["protocols"]["mmmu"]["all"]["accuracy"] == pytest.approx(38.25 / 40)
    page = files[1].read_text()
    assert "<p>no rule for these questions: llava-med, lmms-eval</p>" in page
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert page.count("<article") == 26 and page.count("data:image/jpeg;base64") == 26


def test_rows_by_group_stand_below_their_protocol(
    benchmark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [dict(row, modality="CT" if i < 10 else "MR") for i, row in enumerate(choices(40))]
    write_tsv(benchmark, rows)
    predictions = predicted(benchmark, "model", {0: "B", 11: "A"})
    words = ["score", "--benchmark", str(benchmark), "--predictions", str(predictions)]
    main([*words, "--protocol", "vlmevalkit", "--by", "modality"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(line[0], line[1], line[-4]) for line in lines] == [
        ("vlmevalkit", "0.9500", "40"),
        ("CT", "0.9000", "10"),
        ("MR", "0.9667", "30"),
    ]


def test_a_value_of_a_column_forges_no_row_and_steers_no_terminal(
    benchmark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = "CT\nvlmevalkit  1.0000\x1b[2J\u202e"
    write_tsv(benchmark, choices(4, modality=value) + [{**choices(5)[4], "modality": "MR"}])
    predictions = predicted(benchmark, "model", {})
    words = ["score", "--benchmark", str(benchmark), "--predictions", str(predictions)]
    main([*words, "--protocol", "vlmevalkit", "--by", "modality"])
    lines = capsys.readouterr().out.splitlines()
    row = lines[3]
    assert len(lines) == 5 and row.startswith(r"  CT\nvlmevalkit  1.0000\x1b[2J\u202e")


def test_the_older_form_and_predict_take_the_same_flags() -> None:
    for words in ([], ["predict"]):
        with pytest.raises(ValueError, match="--load"):
            main(words)
    with pytest.raises(ValueError, match="--benchmark needs --output"):
        main(["predict", "--load", "x", "--benchmark", "Set.tsv", "--output", "p.csv"])


def test_compare_tells_two_models_apart(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = predicted(benchmark, "worse", {i: "ABCD"[(i + 1) % 4] for i in range(30)})
    better = predicted(benchmark, "better", {})
    words = ["compare", "--benchmark", str(benchmark), "--protocol", "vlmevalkit"]
    main([*words, str(worse), str(better), "--output", str(tmp_path / "c.json")])
    assert "+0.7500" in capsys.readouterr().out
    result = json.loads((tmp_path / "c.json").read_text())["vlmevalkit"]
    assert (result["a"], result["b"], result["images"]) == (0.25, 1.0, 10)
    assert result["p_value"] < 0.01


def test_what_a_reader_must_know_stands_below_the_rows(
    benchmark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = predicted(benchmark, "model", {})
    settings = {"benchmark_sha256": questions_hash(read_benchmark(benchmark))}
    predictions.with_suffix(".settings.json").write_text(json.dumps(settings))
    score = ["score", "--benchmark", str(benchmark), "--predictions", str(predictions)]
    main([*score, "--protocol", "vlmevalkit"])
    assert len(capsys.readouterr().out.splitlines()) == 3
    rows = choices(40, images=10, modality="CT")
    write_tsv(benchmark, [dict(one, answer="(A)" if i == 7 else "A") for i, one in enumerate(rows)])
    main([*score, "--protocol", "vlmevalkit"])
    odd, other = capsys.readouterr().out.splitlines()[3:]
    assert odd.startswith("1 questions with options") and "first index 7" in odd
    assert (
        other == "model_Set.tsv was made for other questions, options, answers or images than these"
    )
    main(["compare", *score[1:3], "--protocol", "vlmevalkit", *[str(predictions)] * 2])
    assert capsys.readouterr().out.count("made for other questions") == 2
    write_tsv(benchmark, [dict(one, answer="") for one in rows])
    with pytest.raises(ValueError, match="holds no answers to score by"):
        main(score)


def test_leakage_and_scores_without_it(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards(tmp_path / "shards", [[png(0)], [png(3)], [png(99)]])
    leaks = tmp_path / "leaks.json"
    main(["leakage", "--benchmark", str(benchmark), "--shards", str(shards),
          "--output", str(leaks)])  # fmt: skip
    assert "2 of 10 images of Set are among 3 training images" in capsys.readouterr().out
    predictions = predicted(benchmark, "model", {0: "B", 3: "A"})
    words = ["score", "--benchmark", str(benchmark), "--predictions", str(predictions)]
    main([*words, "--protocol", "vlmevalkit", "--leaks", str(leaks)])
    with_all, without = capsys.readouterr().out.splitlines()[2:4]
    assert with_all.split()[1] == "0.9500" and with_all.split()[-4] == "40"
    assert without.split()[3] == "1.0000" and without.split()[-4] == "32"
    write_tsv(benchmark, choices(40, images=9))
    with pytest.raises(ValueError, match="about other questions of Set; run leakage again"):
        main([*words, "--protocol", "vlmevalkit", "--leaks", str(leaks)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge", "http://x/v1"], "--judge-model"),
        (["--judge-model", "m", "--judge", "file:///etc"], "must be an http"),
        (["--leaks", "none.json"], "not a result"),
        (["--protocol", "nothing"], "invalid choice"),
    ],
)
def test_mistakes_are_told(benchmark: Path, flags: list[str], message: str) -> None:
    predictions = predicted(benchmark, "model", {})
    words = ["score", "--benchmark", str(benchmark), "--predictions", str(predictions)]
    with pytest.raises(ValueError, match=message):
        main([*words, *flags])


def test_leaks_of_another_benchmark_are_refused(benchmark: Path, tmp_path: Path) -> None:
    (tmp_path / "leaks.json").write_text(json.dumps({"benchmark": "Other", "matches": []}))
    predictions = predicted(benchmark, "model", {})
    words = ["score", "--benchmark", str(benchmark), "--predictions", str(predictions)]
    with pytest.raises(ValueError, match="about Other, not Set"):
        main([*words, "--leaks", str(tmp_path / "leaks.json")])
