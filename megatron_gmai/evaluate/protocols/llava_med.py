"""LLaVA-Med's first evaluation (`llava/eval/run_eval.py`, version 1).

A closed answer is right if it contains "yes" or "no" anywhere and the truth is a part of it. The
score of an open answer is the share of the truth's words in it (recall), so longer answers score
higher. It has no multiple choice.
"""

from collections import Counter

from megatron_gmai.evaluate.benchmarks.table import Item
from megatron_gmai.evaluate.protocols.verdict import Protocol, Verdict, is_yes_no
from megatron_gmai.evaluate.protocols.words import (
    STOP_NOT_BEFORE_DIGIT,
    normalise_words,
    strip_punctuation,
)


def normalise(text: str) -> str:
    """Its normal form of questions' answers."""
    return normalise_words(strip_punctuation(text, STOP_NOT_BEFORE_DIGIT)).replace(",", "")


def recall(truth: str, said: str) -> float:
    """Share of the truth's words that are said; a word that is repeated in the answer counts as
    often as it stands there."""
    wanted, given = (Counter(normalise(text).split()) for text in (truth, said))
    found = sum(given[word] for word in wanted)
    missing = sum(count for word, count in wanted.items() if word not in given)
    return found / (found + missing) if found else 0.0


def _rule(item: Item, answer: str, benchmark: str) -> Verdict | None:
    if item.options:
        return None
    truth, said = normalise(item.answer.lower()), normalise(answer.lower())
    answer_type = item.columns.get("answer_type", "").strip().upper()
    if answer_type == "CLOSED" or (answer_type != "OPEN" and is_yes_no(item.answer)):
        if "yes" not in said and "no" not in said:
            return Verdict.none()
        return Verdict.of(truth in said, said)
    return Verdict(recall(truth, said), said, unanswered=not said)


LLAVA_MED = Protocol("llava-med", "LLaVA-Med v1, run_eval.py (open: recall)", _rule)
