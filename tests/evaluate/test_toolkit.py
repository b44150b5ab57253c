"""Our rules against VLMEvalKit's own functions, where a checkout of it is there.

    VLMEVALKIT=CHECKOUT [VLMEVALKIT_PYTHON=PYTHON] pytest -m toolkit tests/evaluate/test_toolkit.py

PYTHON needs what its matching imports (pandas, rich, sty, validators, ...), torch is not among it.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_gmai.evaluate.benchmarks.table import Benchmark, Item
from megatron_gmai.evaluate.protocols.registry import PROTOCOLS
from megatron_gmai.evaluate.protocols.vlmevalkit import extract_yes_no, match_option
from megatron_gmai.evaluate.protocols.words import process_answer, strip_punctuation
from megatron_gmai.evaluate.scores import judge_all

pytestmark = [
    pytest.mark.toolkit,
    pytest.mark.skipif("VLMEVALKIT" not in os.environ, reason="VLMEVALKIT names no checkout"),
]
WORDS = """A B C D E Z a b the answer is Answer: (A) (B) B. **C** MRI CT x-ray X-ray PET
fracture left lung none None NA nan two 1,000 3.5 cm. e.g. yes no Yes, No. normal unknown dont
it's an not correct Cannot determine the answer because signal so . , ? - T1-weighted axial
option best right : 5 (c) I'm sorry, but without the image provided Failed to obtain via API"""
OPTIONS: list[dict[str, str]] = [
    {"A": "CT", "B": "MRI", "C": "X-ray", "D": "PET"},
    {"A": "Left lung", "B": "Right lung", "C": "None", "D": "both"},
    {"A": "yes", "B": "no", "C": "NA", "D": "unclear"},
    {"A": "two", "B": "None of these", "C": "five", "D": "an axial slice"},
]
COUNT = 2000


def sentences(rng: random.Random, count: int) -> list[str]:
    words = WORDS.split()
    said = [
        " ".join(rng.choices(words, k=rng.choice([1, 1, 2, 3, 4, 6, 12]))) for _ in range(count)
    ]
    return [text.replace(" because", "\n\nbecause") for text in said]


def rows(rng: random.Random) -> list[dict[str, Any]]:
    """Rotations of 500 questions, as the circular sets number them."""
    made = []
    for index, said in enumerate(sentences(rng, COUNT)):
        turn, number = divmod(index, COUNT // 4)
        options = OPTIONS[number % len(OPTIONS)]
        texts = [*options.values()][turn:] + [*options.values()][:turn]
        truth = "ABCD"[texts.index(options["A"])]
        answer = said if rng.random() < 0.3 else rng.choice([truth, texts["ABCD".index(truth)]])
        made.append(
            {
                "index": number + 1_000_000 * turn,
                "question": "q",
                **dict(zip("ABCD", texts, strict=True)),
                "answer": truth,
                "prediction": answer,
            }
        )
    return made


@pytest.fixture(scope="module")
def asked() -> dict[str, Any]:
    rng = random.Random(7)
    return {
        "matching": [(text, rng.choice(OPTIONS)) for text in sentences(rng, COUNT)],
        "texts": sentences(rng, COUNT),
        "rows": rows(rng),
        "name": "Set",
    }


@pytest.fixture(scope="module")
def told(asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("toolkit") / "told.json"
    python = os.environ.get("VLMEVALKIT_PYTHON", sys.executable)
    script = Path(__file__).with_name("vlmevalkit_answers.py")
    words = [python, str(script), os.environ["VLMEVALKIT"], str(output)]
    subprocess.run(words, input=json.dumps(asked), text=True, check=True, timeout=600)
    return json.loads(output.read_text())


def test_answers_are_matched_to_the_same_options(
    asked: dict[str, Any], told: dict[str, Any]
) -> None:
    ours = [match_option(answer, options) or False for answer, options in asked["matching"]]
    assert ours == told["matching"]
    assert len(set(ours)) == 6  # A to D, Z, and none


def test_texts_are_normalised_alike(asked: dict[str, Any], told: dict[str, Any]) -> None:
    assert [extract_yes_no(text) for text in asked["texts"]] == told["yes_no"]
    assert [strip_punctuation(text) for text in asked["texts"]] == told["punctuation"]
    assert [process_answer(text) for text in asked["texts"]] == told["answers"]


@pytest.mark.parametrize(("name", "rule"), [("Set", "vanilla"), ("My_circular_set", "circular")])
def test_a_benchmark_gets_the_same_verdicts(
    asked: dict[str, Any], told: dict[str, Any], name: str, rule: str
) -> None:
    items = [
        Item(
            str(row["index"]),
            row["question"],
            row["answer"],
            {letter: row[letter] for letter in "ABCD"},
            "",
            "image",
            {},
            (0, 0),
        )
        for row in asked["rows"]
    ]
    benchmark = Benchmark(name, Path(), items, 0)
    answered = list(zip(items, (row["prediction"] for row in asked["rows"]), strict=True))
    scored = judge_all(PROTOCOLS["vlmevalkit"], benchmark, answered)
    assert {one.item.index: one.verdict.score for one in scored} == told[rule]
    assert 0.1 < sum(told[rule].values()) / len(told[rule]) < 0.9
