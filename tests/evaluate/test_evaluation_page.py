"""The worked example of docs/evaluation.md runs as it stands, and its other commands parse."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from megatron_gmai.evaluate.commands import compare_parser
from tests.evaluate.tables import png
from tests.evaluate.test_leakage import make_shards
from tests.training.command import ROOT, finish, run
from tools import evaluate as evaluate_tool
from tools import make_benchmark, serve

PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").replace("\\\n", " ")
LINES = re.findall(r"^    python (.+)$", PAGE, flags=re.MULTILINE)
COMMANDS = [shlex.split(line, comments=True) for line in LINES]


def commands(program: str) -> list[list[str]]:
    return [words[1:] for words in COMMANDS if words[0] == f"tools/{program}.py"]


def test_the_worked_example_runs(
    checkpoints: Path, held_out_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "run"
    (work / "phase3").mkdir(parents=True)
    (work / "data").mkdir()
    for file in (held_out_file, *tmp_path.glob("*.png")):
        file.rename(work / "data" / file.name)
    (work / "phase3" / "checkpoints").symlink_to(checkpoints)
    make_shards(work / "shards", [[png(1)], [(work / "data" / "a.png").read_bytes()]])

    def of_this_run(words: list[str]) -> list[str]:
        return [word.replace("$run", str(work)) for word in words]

    (make,) = commands("make_benchmark")
    assert make_benchmark.main(of_this_run(make)) == 0
    predict, leakage, score, _ = commands("evaluate")
    program = run([sys.executable, "tools/evaluate.py", *of_this_run(predict), "--device", "cpu"])
    said = finish(program)
    assert program.returncode == 0, said
    evaluate_tool.main(of_this_run(leakage))
    evaluate_tool.main(of_this_run(score))
    said = capsys.readouterr().out
    assert "2 of 4 images of QuickStart are among 2 training images" in said
    assert "without leaked images" in said
    scores = json.loads((work / "eval" / "scores.json").read_text())
    assert scores["predictions"]["settings"]["prompt"] == "plain"
    assert "<article" in (work / "eval" / "cases.html").read_text()


def test_the_other_commands_are_known_to_their_programs() -> None:
    compare = commands("evaluate")[-1]
    flags = evaluate_tool.Parser()
    compare_parser(flags)
    assert compare[0] == "compare" and flags.parse_args(compare[1:]).second.name == "B_SET.tsv"
    (served,) = commands("serve")
    assert serve.parser().parse_args(served).examples.name == "FOLDER_OF_IMAGES"
