"""When an answer counts as right, and how often it does.

Every kind of question is scored by exact match after normalisation, captions and open answers too:
another wording counts as wrong. Only two kinds of answer may go on after the point: yes/no ("Yes,
it is." for "yes") and the letter of a choice ("B. ultrasound" for "B").
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_gmai.evaluate.questions import Question

_OPTION_LINE = re.compile(r"^\(?[A-Z][.):]\s", re.MULTILINE)
_BARE_LETTER = re.compile(r"\(?([a-z])[.):]*")
_LEADING_LETTER = re.compile(r"\(?([a-z])(?:[.):]+(?:\s.*)?)?")
_FIRST_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Answer:
    """What the model said to a question."""

    question: Question
    text: str

    @property
    def correct(self) -> bool:
        return is_correct(self.question.text, self.question.expected, self.text)


def normalise(text: str) -> str:
    """Lower case, single spaces, no full stop and no space at the ends."""
    return " ".join(text.casefold().split()).rstrip(". ")


def is_correct(question: str, expected: str, answer: str) -> bool:
    """Whether an answer says what is expected; see the head of this file for the rules."""
    wanted, given = normalise(expected), normalise(answer)
    if wanted == given:
        return True
    if wanted in ("yes", "no"):
        first = _FIRST_WORD.match(given)
        return first is not None and first.group() == wanted
    # "A. niger" is a choice only where choices are offered.
    letters = _LEADING_LETTER if len(_OPTION_LINE.findall(question)) > 1 else _BARE_LETTER
    letter, chosen = letters.fullmatch(wanted), _LEADING_LETTER.fullmatch(given)
    return letter is not None and chosen is not None and letter.group(1) == chosen.group(1)


@dataclass(frozen=True)
class Score:
    """Right answers among those given."""

    correct: int
    asked: int

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> "Score":
        return cls(sum(answer.correct for answer in answers), len(answers))

    @property
    def accuracy(self) -> float:
        return self.correct / self.asked


def score_by(answers: Sequence[Answer], group: Callable[[Question], str]) -> dict[str, Score]:
    """Scores of the answers that share a group, groups in alphabetical order."""
    groups = sorted({group(answer.question) for answer in answers})
    return {
        name: Score.of([answer for answer in answers if group(answer.question) == name])
        for name in groups
    }


def table(title: str, scores: dict[str, Score]) -> str:
    """Lines of group, accuracy, right of asked."""
    width = max(len(title), *map(len, scores)) + 2
    lines = [f"{title:<{width}}accuracy     right"]
    lines += [
        f"{name:<{width}}{score.accuracy:>8.3f}{f'{score.correct}/{score.asked}':>10}"
        for name, score in scores.items()
    ]
    return "\n".join(lines)
