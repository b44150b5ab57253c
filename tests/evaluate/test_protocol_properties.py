"""What must hold of protocols for any answer, on generated ones."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_gmai.evaluate.benchmarks.table import Item, read_benchmark
from megatron_gmai.evaluate.protocols.registry import PROTOCOLS
from megatron_gmai.evaluate.scores import judge_all
from tests.evaluate.tables import cell, item, png, write_tsv

WORDS = """A B C D (A) (B). C: **D** the answer is answer: MRI CT x-ray PET lesion left lung none
None yes no Yes, normal 1,000 3.5 cm 2 two isn't isnt so because signal \\boxed{B}
<answer>CT</answer> Z 肺 没有 , ; e.g."""
OPTIONS = {"A": "CT", "B": "MRI", "C": "X-ray film", "D": "PET"}


def answers(count: int, seed: int = 0) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(count):
        yield " ".join(rng.choices(WORDS.split(), k=rng.choice([1, 1, 2, 3, 5, 9])))


def permuted(question: Item, order: str) -> tuple[Item, dict[str, str]]:
    """The question with its options in another order, and the new letter of each old one."""
    new = dict(zip(order, "ABCD", strict=True))
    options = {new[letter]: text for letter, text in question.options.items()}
    moved = item(new[question.answer], dict(sorted(options.items())))
    return moved, new


def test_every_protocol_gives_a_share_and_says_what_it_took() -> None:
    questions = [item("B", OPTIONS), item("yes"), item("left lung"), item("7.5")]
    for protocol in PROTOCOLS.values():
        for question in questions:
            for answer in ["", *answers(300)]:
                verdict = protocol.rule(question, answer, "Set")
                if verdict is not None:
                    assert 0 <= verdict.score <= 1
                    assert not (verdict.unanswered and verdict.score == 1)


@pytest.mark.parametrize("name", ["vlmevalkit", "vlmevalkit-2024", "medevalkit", "mmmu"])
def test_the_order_of_options_does_not_matter_to_a_letter(name: str) -> None:
    rule = PROTOCOLS[name].rule
    for seed, order in enumerate(("BCDA", "DCBA", "CADB")):
        for truth in "ABCD":
            question = item(truth, OPTIONS)
            moved, new = permuted(question, order)
            for form in ("{}", "{}.", "the answer is {}", "({})"):
                letter = "ABCD"[seed]
                before = rule(question, form.format(letter), "Set")
                after = rule(moved, form.format(new[letter]), "Set")
                assert before is not None and after is not None
                if not before.fallback:
                    assert before.score == after.score


@pytest.mark.parametrize("name", ["vlmevalkit", "vlmevalkit-2024", "omnimedvqa"])
def test_the_order_of_options_does_not_matter_to_a_text(name: str) -> None:
    rule = PROTOCOLS[name].rule
    for truth in "ABCD":
        question = item(truth, OPTIONS)
        for order in ("BCDA", "DCBA", "CADB"):
            moved, _ = permuted(question, order)
            for answer in (*OPTIONS.values(), "an MRI scan", "a PET image"):
                before, after = rule(question, answer, "Set"), rule(moved, answer, "Set")
                assert before is not None and after is not None
                assert before.score == after.score


@pytest.mark.parametrize("name", list(PROTOCOLS))
@pytest.mark.parametrize(
    "question", [item("B", OPTIONS), item("yes"), item("left lung")], ids=["choice", "yes", "open"]
)
def test_a_full_stop_behind_a_plain_answer_changes_nothing(name: str, question: Item) -> None:
    """But where a protocol says so: MedEvalKit compares open answers as they are, OmniMedVQA
    measures the similarity of the whole text, of which the full stop is a part."""
    rule = PROTOCOLS[name].rule
    for answer in ("B", "MRI", "yes", "no", "Yes", "left lung", "the left lung", "the answer is B"):
        before, after = rule(question, answer, "Set"), rule(question, f"{answer}.", "Set")
        if before is None or after is None:
            assert before is after
        elif name == "medevalkit" and question.answer == "left lung" and answer == "left lung":
            assert (before.score, after.score) == (1, 0)
        else:
            assert before.score == after.score, answer


def test_circular_scores_are_at_most_the_plain_ones(tmp_path: Path) -> None:
    """Of the same rotations: a circle is right only if its first row is."""
    rng = random.Random(1)
    rows, predictions = [], {}
    for number in range(40):
        for turn in range(4):
            index = number + turn * 1_000_000
            texts = ["CT", "MRI", "X-ray", "PET"]
            texts = texts[turn:] + texts[:turn]
            truth = "ABCD"[texts.index("MRI")]
            rows.append(
                {
                    "index": index,
                    "image": cell(png(number)) if turn == 0 else str(number),
                    "question": "q",
                    **dict(zip("ABCD", texts, strict=True)),
                    "answer": truth,
                }
            )
            predictions[str(index)] = truth if rng.random() < 0.85 else rng.choice("ABCD")
    plain = read_benchmark(write_tsv(tmp_path / "plain.tsv", rows))
    circular = read_benchmark(write_tsv(tmp_path / "MMBench.tsv", rows))
    protocol = PROTOCOLS["vlmevalkit"]
    scores = []
    for benchmark in (plain, circular):
        answered = [(one, predictions[one.index]) for one in benchmark.items]
        scored = judge_all(protocol, benchmark, answered)
        scores.append([one.verdict.score for one in scored])
    assert (len(scores[0]), len(scores[1])) == (160, 40)
    assert 0 < sum(scores[1]) / 40 < sum(scores[0]) / 160
    firsts = [s for s, one in zip(scores[0], plain.items, strict=True) if int(one.index) < 1e6]
    assert all(circle <= first for circle, first in zip(scores[1], firsts, strict=True))
