"""tools/evaluate.py, started as a user starts it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gmai.config import Config
from megatron_gmai.data.text.tokenizer import load_tokenizer
from megatron_gmai.evaluate.loading import tokenizer_for
from tests.evaluate.models import config_for
from tests.training.command import ROOT, finish, launcher, run
from tools.evaluate import main


def evaluate(ranks: int, *flags: Any) -> tuple[int, str]:
    words = [*launcher(ranks), str(ROOT / "tools" / "evaluate.py"), "--device", "cpu"]
    process = run([*words, *map(str, flags)])
    output = finish(process)
    return process.returncode, output


def test_one_process_and_two_data_parallel_ranks_report_the_same(
    checkpoints: Path, held_out_file: Path, tmp_path: Path
) -> None:
    reports = []
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.json"
        flags = ["--load", checkpoints, "--data", held_out_file, "--output", file]
        status, output = evaluate(ranks, *flags, "--batch-size", 2, "--max-new-tokens", 5)
        assert status == 0, output
        assert "2 of 9 records were skipped" in output
        reports.append(json.loads(file.read_text()))
    one, two = reports
    assert [sample["id"] for sample in one["samples"]][1:4] == ["text", "two", "turns"]
    assert len({sample["answer"] for sample in one["samples"]}) > 1
    assert [skip["id"] for skip in one["skipped"]] == ["missing", "long"]
    assert set(one["by_question_type"]) == {"untyped", "yes_no"}
    assert set(one["by_class"]) == {"b", "unnamed"}
    right = sum(sample["correct"] for sample in one["samples"])
    assert one["accuracy"] == right / 7 and one["asked"] == 7
    assert one | {"seconds": 0} == two | {"seconds": 0}


def test_a_users_mistake_gets_one_line_and_status_2(held_out_file: Path, tmp_path: Path) -> None:
    status, output = evaluate(1, "--load", tmp_path, "--data", held_out_file)
    assert status == 2
    assert output.startswith("error: ") and "not a whole checkpoint" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--data"),
        (("--data", "nowhere.json"), "cannot read annotations nowhere.json"),
        (("--data", "DATA", "--tp", "3"), "does not divide"),
        (("--data", "DATA", "--batch-size", "0"), "at least 1"),
        (("--data", "DATA", "--tokenizer", "nowhere.model"), "no sentencepiece model"),
    ],
)
def test_a_mistake_in_the_flags_is_told_before_anything_is_built(
    checkpoints: Path, held_out_file: Path, flags: tuple[str, ...], message: str
) -> None:
    given = [str(held_out_file) if flag == "DATA" else flag for flag in flags]
    with pytest.raises(ValueError, match=message):
        main(["--load", str(checkpoints), *given])


def test_the_tokenizer_of_another_model_is_refused(tokenizer_file: Path) -> None:
    config = config_for(load_tokenizer(tokenizer_file))
    model = dataclasses.replace(config.model, image_token_id=5)
    with pytest.raises(ValueError, match="the file that the model was trained with"):
        tokenizer_for(dataclasses.replace(config, model=model), str(tokenizer_file))


def test_a_checkpoint_without_a_tokenizer_asks_for_one() -> None:
    with pytest.raises(ValueError, match="give --tokenizer FILE"):
        tokenizer_for(Config(), None)
