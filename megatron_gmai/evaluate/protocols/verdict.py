"""What a protocol says about one answer."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_gmai.evaluate.benchmarks.table import Item


@dataclass(frozen=True, slots=True)
class Verdict:
    """`score` is 1 or 0, or in between where a protocol counts parts or draws an option by lot:
    then it is the expectation."""

    score: float
    parsed: str  # what the protocol takes the answer for; "" if for nothing
    unanswered: bool = False
    fallback: bool = False  # the last resort of the protocol: the nearest option, or a draw

    @staticmethod
    def of(right: bool, parsed: str, fallback: bool = False) -> "Verdict":
        return Verdict(float(right), parsed, fallback=fallback)

    @staticmethod
    def none(score: float = 0.0, fallback: bool = False) -> "Verdict":
        """No answer was found."""
        return Verdict(score, "", unanswered=True, fallback=fallback)


# Question, answer, name of the benchmark -> verdict; None where the protocol has no rule for such a
# question.
Rule = Callable[[Item, str, str], Verdict | None]


@dataclass(frozen=True)
class Protocol:
    """A named way to score."""

    name: str
    source: str  # whose rules these are, and as of when
    rule: Rule
    reads_by_pandas: bool = False  # columns of numbers may become floats
    circular: bool = False  # rotations of a question count together
    judges_choices: bool = False  # a judge model may match an answer that the rule does not
    judges_open: bool = False  # a judge model decides about open questions


def is_yes_no(truth: str) -> bool:
    return truth.strip().lower() in ("yes", "no")
