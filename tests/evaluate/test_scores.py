"""Verdicts become rows: circles, groups, what is left out, and a judge that can be done without."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_gmai.evaluate.benchmarks.table import Benchmark, read_benchmark
from megatron_gmai.evaluate.judge import Judge, read_letter, read_yes
from megatron_gmai.evaluate.protocols.registry import PROTOCOLS
from megatron_gmai.evaluate.report import Scores, to_table, to_text
from megatron_gmai.evaluate.scores import by_group, join, judge_all, result_to_json, summarise
from tests.evaluate.tables import cell, choices, png, write_tsv


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    """Four multiple choices, two yes/no, two open; three images."""
    rows = choices(4, images=2, modality="CT")
    mixed: list[dict[str, Any]] = [
        {"question": "Is it?", "answer": "yes", "modality": "MR"},
        {"question": "Is it not?", "answer": "no", "modality": "MR"},
        {"question": "What?", "answer": "left lung", "modality": "CT"},
        {"question": "Where?", "answer": "brain"},
    ]
    image = cell(png(7))
    rows += [{"index": 4 + i, "image": image, **row} for i, row in enumerate(mixed)]
    return read_benchmark(write_tsv(tmp_path / "Set.tsv", rows))


PREDICTIONS = {
    "0": "A",
    "1": "I do not know",
    "2": "C",
    "3": "A",
    "4": "Yes, it is",
    "5": "normal",
    "6": "the left lung",
    "7": "liver",
}


def scored(benchmark: Benchmark, protocol: str, judge: Judge | None = None) -> dict[str, Any]:
    verdicts = judge_all(PROTOCOLS[protocol], benchmark, join(benchmark, PREDICTIONS), judge)
    return {one.item.index: one for one in verdicts}


def test_each_protocol_counts_what_it_has_a_rule_for(benchmark: Benchmark) -> None:
    counts = {name: len(scored(benchmark, name)) for name in PROTOCOLS}
    assert counts == {
        "vlmevalkit": 6,
        "vlmevalkit-2024": 6,
        "medevalkit": 8,
        "llava-med": 4,
        "omnimedvqa": 4,
        "mmmu": 8,
        "lmms-eval": 4,
    }


def test_a_row_counts_right_unanswered_and_fallbacks(benchmark: Benchmark) -> None:
    row = summarise(list(scored(benchmark, "vlmevalkit").values()))
    assert (row.n, row.accuracy, row.unanswered, row.fallbacks) == (6, 0.5, 2, 0)
    assert row.images == 3 and row.interval.low < 0.5 < row.interval.high
    mmmu = summarise(list(scored(benchmark, "mmmu").values()))
    assert mmmu.fallbacks == 1 and scored(benchmark, "mmmu")["1"].verdict.score == 0.25


def test_rows_by_group_leave_out_questions_without_the_column(benchmark: Benchmark) -> None:
    verdicts = list(scored(benchmark, "medevalkit").values())
    rows = by_group(verdicts, "modality")
    assert {name: row.n for name, row in rows.items()} == {"CT": 5, "MR": 2}
    kinds = by_group(verdicts, "kind")
    assert {name: row.n for name, row in kinds.items()} == {
        "multiple_choice": 4,
        "open": 2,
        "yes_no": 2,
    }
    result = result_to_json(verdicts)
    assert result is not None and set(result["groups"]) == {"kind", "modality"}


def test_a_missing_prediction_is_an_error_not_a_wrong_answer(benchmark: Benchmark) -> None:
    with pytest.raises(ValueError, match="1 of 8 questions of Set have no prediction"):
        join(benchmark, {k: v for k, v in PREDICTIONS.items() if k != "5"})


def test_questions_without_a_published_answer_are_not_scored(tmp_path: Path) -> None:
    rows = [{**row, "answer": ""} for row in choices(3)]
    hidden = read_benchmark(write_tsv(tmp_path / "TEST.tsv", rows))
    answered = [(one, "A") for one in hidden.items]
    for protocol in PROTOCOLS.values():
        assert judge_all(protocol, hidden, answered) == []
    assert result_to_json([]) is None


def test_a_gap_makes_numbers_floats_for_who_reads_with_pandas(tmp_path: Path) -> None:
    rows = choices(2)
    rows[0] |= dict(A="1", B="2", C="3", D="4")
    rows[1] |= dict(A="1", B="2", C="3", D="")
    table = read_benchmark(write_tsv(tmp_path / "Set.tsv", rows))
    answered = join(table, {"0": "4", "1": "2"})
    ours, theirs = (judge_all(PROTOCOLS[n], table, answered) for n in ("medevalkit", "vlmevalkit"))
    assert [one.verdict.parsed for one in theirs] == ["", "B"]  # D reads "4.0", B still "2"
    assert theirs[0].item.options["D"] == "4" and len(ours) == 2


class TestCircles:
    ROWS = (
        (5, "A", {"A": "CT", "B": "MRI"}),
        (1_000_005, "B", {"A": "MRI", "B": "CT"}),
        (6, "A", {"A": "CT", "B": "MRI"}),
        (1_000_006, "B", {"A": "MRI", "B": "CT"}),
        (2_000_009, "A", {"A": "CT", "B": "MRI"}),  # its main row is not there: not counted
    )

    def scores(self, tmp_path: Path, predictions: dict[str, str]) -> dict[str, float]:
        rows = [
            {"index": i, "image": cell(png(i % 1000)), "question": "q", "answer": a, **options}
            for i, a, options in self.ROWS
        ]
        circular = read_benchmark(write_tsv(tmp_path / "my_circular.tsv", rows))
        verdicts = judge_all(PROTOCOLS["vlmevalkit"], circular, join(circular, predictions))
        return {one.item.index: one.verdict.score for one in verdicts}

    def test_all_rotations_must_be_right(self, tmp_path: Path) -> None:
        all_right = {"5": "A", "1000005": "B", "6": "A", "1000006": "A", "2000009": "A"}
        assert self.scores(tmp_path, all_right) == {"5": 1, "6": 0}

    def test_a_rotation_without_an_answer_makes_the_question_wrong(self, tmp_path: Path) -> None:
        silent = {"5": "A", "1000005": "?", "6": "CT", "1000006": "CT", "2000009": "A"}
        assert self.scores(tmp_path, silent) == {"5": 0, "6": 1}


class TestJudge:
    def ask(self, prompt: str) -> str:
        self.prompts.append(prompt)
        if "Options:" in prompt:
            return "B"
        return "Yes." if "left lung" in prompt else "No, they differ."

    def setup_method(self) -> None:
        self.prompts: list[str] = []

    def test_it_decides_what_the_rules_leave_open(
        self, benchmark: Benchmark, tmp_path: Path
    ) -> None:
        judge = Judge("a model", tmp_path / "answers.jsonl", self.ask)
        one = scored(benchmark, "vlmevalkit", judge)
        assert {i for i in one if one[i].judged} == {"1", "6", "7"}
        assert [one[i].verdict.score for i in ("1", "6", "7")] == [1, 1, 0]
        assert len(self.prompts) == 3
        assert scored(benchmark, "llava-med", judge)["6"].judged is False
        pathology = scored(replace(benchmark, name="PathVQA"), "vlmevalkit", judge)
        assert {i for i in pathology if pathology[i].judged} == {"1", "4", "5", "6", "7"}

    def test_the_score_repeats_from_stored_answers_without_it(
        self, benchmark: Benchmark, tmp_path: Path
    ) -> None:
        store = tmp_path / "answers.jsonl"
        first = scored(benchmark, "medevalkit", Judge("a model", store, self.ask))
        asked = len(self.prompts)
        again = scored(benchmark, "medevalkit", Judge("a model", store, None))
        assert again == first and len(self.prompts) == asked == 2
        with pytest.raises(ValueError, match="2 of 2 answers of the judge another"):
            scored(benchmark, "medevalkit", Judge("another", store, None))

    def test_a_store_cut_off_by_a_kill_is_asked_again_for_the_rest(
        self, benchmark: Benchmark, tmp_path: Path
    ) -> None:
        store = tmp_path / "answers.jsonl"
        scored(benchmark, "medevalkit", Judge("a model", store, self.ask))
        lines = store.read_text().splitlines(keepends=True)
        store.write_text(lines[0] + lines[1][:20])
        scored(benchmark, "medevalkit", Judge("a model", store, self.ask))
        assert len(self.prompts) == 3
        scored(benchmark, "medevalkit", Judge("a model", store, None))

    @pytest.mark.parametrize(
        ("reply", "letter"),
        [("B", "B"), ("B.", "B"), ("Z", None), ("B or C", None), ("E", None), ("", None)],
    )
    def test_only_one_known_letter_is_a_reply(self, reply: str, letter: str | None) -> None:
        assert read_letter(reply, "ABCD") == letter

    def test_only_one_of_yes_and_no_is_a_reply(self) -> None:
        assert [read_yes(r) for r in ("Yes!", "no", "yes or no", "same")] == [
            True,
            False,
            None,
            None,
        ]


def test_the_result_tells_how_it_came_about(benchmark: Benchmark, tmp_path: Path) -> None:
    predictions = tmp_path / "model_Set.tsv"
    predictions.write_text("index\tprediction\n")
    settings = {"prompt": "vlmevalkit", "weights_sha256": "ab"}
    (tmp_path / "model_Set.settings.json").write_text(json.dumps(settings))
    verdicts = {
        name: list(scored(benchmark, name).values()) for name in ("medevalkit", "omnimedvqa")
    }
    result = Scores(benchmark, predictions, verdicts, leaked={"0", "4"}).to_json()
    assert result["rule_version"] >= 1 and result["predictions"]["settings"] == settings
    assert result["benchmark"]["questions"] == 8 and len(result["benchmark"]["sha256"]) == 64
    medevalkit = result["protocols"]["medevalkit"]
    assert (medevalkit["all"]["n"], medevalkit["without_leaked"]["n"]) == (8, 6)
    table = to_table(result)
    assert [row[0] for row in table[1:]] == [
        "medevalkit",
        "  without leaked images",
        "omnimedvqa",
        "  without leaked images",
    ]
    assert len({len(line) for line in to_text(result).splitlines()[1:]}) == 1
