"""Which answers count as right."""

import pytest

from megatron_gmai.evaluate.questions import Question
from megatron_gmai.evaluate.scoring import Answer, Score, is_correct, score_by, table

OPEN = "What is shown?"
CHOICE = "What is shown?\nA. liver\nB. lung\nAnswer with the letter."


@pytest.mark.parametrize(
    ("question", "expected", "answer"),
    [
        (OPEN, "lung", "lung"),
        (OPEN, "Chest X-ray", " chest   x-ray. "),
        (OPEN, "MR of a knee.", "mr of a knee"),
        (OPEN, "yes", "Yes, it is a lung."),
        (OPEN, "No", "no"),
        (CHOICE, "B", "b"),
        (CHOICE, "B", "B. lung"),
        (CHOICE, "B", "(B) lung"),
        (CHOICE, "B", "B) a lung."),
        (CHOICE, "B. lung", "B"),
        (OPEN, "C", "C."),
    ],
)
def test_right(question: str, expected: str, answer: str) -> None:
    assert is_correct(question, expected, answer)


@pytest.mark.parametrize(
    ("question", "expected", "answer"),
    [
        (OPEN, "lung", ""),
        (OPEN, "lung", "a lung"),
        (OPEN, "yes", "no"),
        (OPEN, "no", "normal"),
        (OPEN, "no", "yes, no doubt"),
        (CHOICE, "B", "A"),
        (CHOICE, "B", "A. lung"),
        (CHOICE, "A", "a liver"),
        (CHOICE, "B", ""),
        (OPEN, "A. niger", "A. fumigatus"),
        (OPEN, "", "lung"),
    ],
)
def test_wrong(question: str, expected: str, answer: str) -> None:
    assert not is_correct(question, expected, answer)


def answer(question_type: str, expected: str, said: str) -> Answer:
    return Answer(Question(0, "key", OPEN, expected, question_type, "class"), said)


def test_scores_are_counted_per_group_in_alphabetical_order() -> None:
    answers = [answer("organ", "lung", "lung"), answer("modality", "CT", "MR"),
               answer("organ", "lung", "liver")]  # fmt: skip
    scores = score_by(answers, lambda question: question.question_type)
    assert list(scores.items()) == [("modality", Score(0, 1)), ("organ", Score(1, 2))]
    assert scores["organ"].accuracy == 0.5


def test_the_table_has_a_line_for_each_group() -> None:
    lines = table("type", {"organ": Score(1, 2), "modality": Score(3, 3)}).splitlines()
    assert [line.split() for line in lines] == [
        ["type", "accuracy", "right"],
        ["organ", "0.500", "1/2"],
        ["modality", "1.000", "3/3"],
    ]
