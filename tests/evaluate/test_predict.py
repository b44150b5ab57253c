"""Predicting a benchmark: the same answers from any ranks, and after a kill."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import transformers

from megatron_gmai.config import DataConfig
from megatron_gmai.data.images.decode import load_image
from megatron_gmai.data.text.tokenizer import Tokenizer
from megatron_gmai.evaluate.benchmarks.predictions import read_predictions
from megatron_gmai.evaluate.benchmarks.table import read_benchmark
from megatron_gmai.evaluate.predict import (
    BenchmarkQuestions,
    append_answers,
    claim,
    files_hash,
    predict,
    read_answers,
)
from megatron_gmai.evaluate.questions import Asked, HeldOut, Skipped
from megatron_gmai.evaluate.report import read_settings
from megatron_gmai.evaluate.sampling import GREEDY, Sampling
from megatron_gmai.model.vit import CLIP_MEAN, CLIP_STD
from tests.evaluate.models import build, config_for
from tests.evaluate.tables import cell, png, write_tsv
from tests.evaluate.test_program import evaluate
from tests.parallel.cases import Processes
from tests.training.command import ROOT, finish, forked, run
from tools.make_benchmark import main as make_benchmark

NEW = 5


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Six questions; the image of the last is broken."""
    both = repr([cell(png(1)), cell(png(2))])
    rows = [
        {"index": 0, "image": cell(png(1)), "question": "is a lung shown", "answer": "yes"},
        {"index": 1, "image": "0", "question": "what is shown", "A": "a brain", "B": "a lung",
         "answer": "A"},
        {"index": 2, "image": both, "question": "left right", "answer": "left"},
        {"index": 3, "image": cell(png(3)), "question": "is a brain shown here", "answer": "no"},
        {"index": 4, "image": cell(png(4)), "question": "scan", "answer": "no"},
        {"index": 5, "image": cell(b"broken" * 20), "question": "scan", "answer": "no"},
    ]  # fmt: skip
    return write_tsv(tmp_path / "Set.tsv", rows)


def questions(table: Path, tokenizer: Tokenizer, style: str = "plain") -> BenchmarkQuestions:
    model = config_for(tokenizer).model
    return BenchmarkQuestions(read_benchmark(table), style, DataConfig(), model, tokenizer, NEW)


def test_a_question_is_the_prompt_that_training_would_have_shown(
    tmp_path: Path, tokenizer: Tokenizer, held_out_file: Path
) -> None:
    """Held-out records by themselves, and by way of a table."""
    model = config_for(tokenizer).model
    held_out = HeldOut(held_out_file, DataConfig(), model, tokenizer, NEW)
    words = ["records", "--source", str(tmp_path), "--output", str(tmp_path / "out")]
    assert make_benchmark(words) == 0
    table = questions(tmp_path / "out" / "records.tsv", tokenizer)
    keys = [item.columns.get("id", "") for item in table.benchmark.items]
    assert keys[1] == "two"
    for number, before in ((0, 0), (1, 2), (2, 4)):
        ours, theirs = table.ask(number), held_out.ask(before)
        assert isinstance(ours, Asked) and isinstance(theirs, Asked)
        assert ours.prompt.tokens.tolist() == theirs.prompt.tokens.tolist()
        assert ours.prompt.image_starts.tolist() == theirs.prompt.image_starts.tolist()
        assert torch.equal(ours.prompt.pixels, theirs.prompt.pixels)


def test_what_cannot_be_asked_has_a_reason(table: Path, tokenizer: Tokenizer) -> None:
    asked = [questions(table, tokenizer).ask(number) for number in range(6)]
    assert [type(one) for one in asked] == [Asked] * 5 + [Skipped]
    assert isinstance(asked[2], Asked) and len(asked[2].prompt.pixels) == 2
    expected = torch.from_numpy(load_image(png(2), 28, True))
    assert torch.equal(asked[2].prompt.pixels[1], expected)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(2.0, 0.9, seed=3)], ids=["greedy", "drawn"])
def test_only_what_is_not_answered_yet_is_asked(
    sampling: Sampling, table: Path, tokenizer: Tokenizer, alone: Processes, tmp_path: Path
) -> None:
    model = build(alone, config_for(tokenizer))
    ours, folder = questions(table, tokenizer), tmp_path / "answers"

    def answer() -> tuple[dict[str, dict[str, str]], list[tuple[int, int]]]:
        counts: list[tuple[int, int]] = []
        told = predict(
            model, ours, model.groups, 2, NEW, folder, lambda d, t: counts.append((d, t)), sampling
        )
        return told, counts

    whole, counts = answer()
    assert counts == [(2, 6), (4, 6), (6, 6)] and "skipped" in whole["5"]
    assert len({one["prediction"] for one in whole.values()}) > 2
    (file,) = folder.glob("*.jsonl")
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.strip()]
    file.write_text("".join(lines[:2]) + lines[2][:9])
    again, counts = answer()
    assert again == whole and counts[-1] == (4, 4)
    assert read_answers(folder) == whole


def test_answers_of_other_settings_are_not_gone_on_with(tmp_path: Path) -> None:
    claim(tmp_path / "a", {"prompt": "plain"})
    claim(tmp_path / "a", {"prompt": "plain"})
    with pytest.raises(ValueError, match="other settings; delete it"):
        claim(tmp_path / "a", {"prompt": "llava"})


def test_stored_answers_come_back(tmp_path: Path) -> None:
    answers = {"1": {"prediction": "a\n肺"}, "2": {"prediction": "", "skipped": "why"}}
    append_answers(tmp_path / "x" / "0.jsonl", answers)
    assert read_answers(tmp_path / "x") == answers and read_answers(tmp_path / "none") == {}


def test_a_hash_of_files_knows_names_and_contents(tmp_path: Path) -> None:
    for name, content in (("a", "1"), ("b", "1"), ("a", "2")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{name}.x").write_text(content)
    first = files_hash(tmp_path / "a")
    assert first != files_hash(tmp_path / "b")
    (tmp_path / "a" / "a.x").write_text("3")
    assert files_hash(tmp_path / "a") != first


def predicted(ranks: int, load: Path, table: Path, output: Path, *flags: str) -> Path:
    words: list[Any] = ["--load", load, "--benchmark", table, "--output", output, *flags]
    words += ["--device", "cpu", "--batch-size", 2, "--max-new-tokens", NEW]
    said = forked(ranks, [str(ROOT / "tools" / "evaluate.py"), *map(str, words)])
    assert "6 predictions, 1 of questions not asked" in said
    return output


def test_any_layout_an_export_and_transformers_predict_the_same(
    checkpoints: Path, exported: Path, table: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    one = predicted(1, checkpoints, table, tmp_path / "one_Set.tsv")
    predictions, settings = read_predictions(one), read_settings(one)
    assert predictions["5"] == "" and len(set(predictions.values())) > 2
    assert settings is not None and settings["prompt"] == "vlmevalkit"
    assert len(settings["weights_sha256"]) == 64 and list(settings["skipped"]) == ["5"]

    data_parallel = predicted(2, checkpoints, table, tmp_path / "two_Set.tsv")
    assert data_parallel.read_bytes() == one.read_bytes()
    layout = ("--tp", "2", "--pp", "2")
    shared = predicted(4, checkpoints, table, tmp_path / "three_Set.json", *layout)
    assert read_predictions(shared) == predictions
    assert json.loads(shared.read_text())[0]["question"] == "is a lung shown"
    for file in (data_parallel, shared):
        assert read_settings(file) == settings

    export = predicted(1, exported, table, tmp_path / "four_Set.tsv")
    assert export.read_bytes() == one.read_bytes()
    assert not list(tmp_path.glob("*.answers"))

    asked = questions(table, tokenizer, "vlmevalkit")
    assert in_transformers(exported, asked) == {i: predictions[i] for i in "01234"}


def in_transformers(folder: Path, asked: BenchmarkQuestions) -> dict[str, str]:
    """Greedy answers of the exported model to what can be asked."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    stop_id = asked.tokenizer.special_id(asked.template.end_of_answer)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    said = {}
    for one in map(asked.ask, range(len(asked))):
        if isinstance(one, Asked):
            tokens = one.prompt.tokens[None]
            made = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                pixel_values=(one.prompt.pixels / 255 - mean) / std,
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=stop_id,
                pad_token_id=0,
            )[0, tokens.size(1) :].tolist()
            ids = [token for token in made if token != stop_id]
            said[one.question.key] = asked.tokenizer.decode(ids).strip()
    return said


def test_answers_of_other_weights_in_the_same_place_are_not_gone_on_with(
    checkpoints: Path, table: Path, tmp_path: Path
) -> None:
    output = predicted(1, checkpoints, table, tmp_path / "one_Set.tsv")
    settings = read_settings(output)
    assert settings is not None
    del settings["skipped"]
    claim(tmp_path / "same_Set.answers", settings)
    predicted(1, checkpoints, table, tmp_path / "same_Set.tsv")
    claim(tmp_path / "other_Set.answers", settings | {"weights_sha256": "0" * 64})
    flags = ["--load", checkpoints, "--benchmark", table, "--output", tmp_path / "other_Set.tsv"]
    status, said = evaluate(1, *flags, "--batch-size", 2, "--max-new-tokens", NEW)
    assert status == 2 and "other settings; delete it" in said


def test_a_run_that_was_killed_goes_on_without_a_lost_or_doubled_answer(
    checkpoints: Path, tmp_path: Path
) -> None:
    """The program itself, killed in the middle, then started again."""
    asked = ("is a lung shown", "what is shown", "left right", "scan")
    rows = [
        {"index": i, "image": "0" if i else cell(png(1)), "question": asked[i % 4]}
        for i in range(120)
    ]
    words = ["--load", str(checkpoints), "--output", str(tmp_path / "model_Set.tsv"),
             "--benchmark", str(write_tsv(tmp_path / "Set.tsv", rows)),
             "--batch-size", "2", "--max-new-tokens", str(NEW)]  # fmt: skip
    answers = tmp_path / "model_Set.answers"
    program = run([sys.executable, "tools/evaluate.py", "predict", "--device", "cpu", *words])
    while len(read_answers(answers)) < 6:
        assert program.poll() is None, finish(program)
        time.sleep(0.01)
    program.kill()
    finish(program)
    assert program.returncode == -signal.SIGKILL
    done = read_answers(answers)
    assert 6 <= len(done) < 120 and not (tmp_path / "model_Set.tsv").exists()

    status, said = evaluate(1, *words)
    assert status == 0, said
    left = 120 - len(done)
    assert f"{left} of {left} questions" in said and "120 predictions" in said
    table = pandas.read_csv(tmp_path / "model_Set.tsv", sep="\t", keep_default_na=False)
    assert table["index"].tolist() == list(range(120)) and not answers.exists()
    assert table.groupby("question").prediction.nunique().tolist() == [1] * 4
    assert table.prediction.nunique() > 1
