"""MMMU's official parsing of answers.

A choice is the last `(X)`, else the last X between spaces, else the last option whose text stands
in an answer of more than five words, else one by lot: here the expectation, one over the number of
options, is the score. An open answer is right if the truth is a part of a key phrase, or equals a
number in one.
"""

import ast
import re

from megatron_gmai.evaluate.benchmarks.table import Item
from megatron_gmai.evaluate.protocols.verdict import Protocol, Verdict

_MOST_WORDS_OF_A_LETTER = 5
_ENDS = (",", ".", "!", "?", ";", ":", "'")
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
# Only from the first digit of a row on, which finds the same: from later ones too, an answer of
# nothing but digits would take quadratic time.
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
Normal = str | float


def parse_choice(answer: str, options: dict[str, str]) -> str | None:
    """The letter, or None where the official code draws one."""
    text = answer.strip()
    for sign in _ENDS:
        text = text.strip(sign)
    text = f" {text} "
    for form in ("({})", " {} "):
        positions = {letter: text.rfind(form.format(letter)) for letter in options}
        if max(positions.values()) >= 0:
            return max(positions, key=lambda letter: positions[letter])
    if len(text.split()) <= _MOST_WORDS_OF_A_LETTER:
        return None
    positions = {letter: text.lower().rfind(option.lower()) for letter, option in options.items()}
    return (
        max(positions, key=lambda letter: positions[letter])
        if max(positions.values()) >= 0
        else None
    )


def choice(item: Item, answer: str) -> Verdict:
    letter = parse_choice(answer, item.options)
    if letter is None:
        expected = float(item.answer in item.options) / len(item.options)
        return Verdict.none(expected, fallback=True)
    return Verdict.of(letter == item.answer, letter)


def parse_open(answer: str) -> set[Normal]:
    """Key phrases of an answer and the numbers in them, in normal form."""
    phrases = _key_phrases(answer.strip().strip(".").lower())
    numbers = [n for phrase in phrases for pattern in _NUMBERS for n in pattern.findall(phrase)]
    return {normal for text in [*phrases, *numbers] for normal in normalise(text)}


def _key_phrases(text: str) -> list[str]:
    """The shortest end of each line behind a key word; the whole text if there is none."""
    lines = text.split("\n")
    found = []
    for line in lines:
        keys = (*_KEYS, "=") if line is lines[-1] else _KEYS
        ends = [line.rpartition(key)[2].strip() for key in keys if key in line]
        shortest = _shortest(ends)
        if shortest and shortest not in _ENDS:
            found.append(shortest)
    return found or [text]


def _shortest(ends: list[str]) -> str:
    """The first of the shortest, where an empty one is replaced by whatever follows."""
    shortest = ""
    for end in ends:
        if not shortest or len(end) < len(shortest):
            shortest = end
    return shortest


def normalise(text: str) -> list[Normal]:
    """Numbers to two decimals, other text in lower case; a single sign with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _truths(answer: str) -> list[str]:
    """Several truths stand in a list literal."""
    if not answer.startswith("["):
        return [answer]
    try:
        truths = ast.literal_eval(answer)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [answer]
    return [str(truth) for truth in truths] if isinstance(truths, list) else [answer]


def _open(item: Item, answer: str) -> Verdict:
    truths = [normal for truth in _truths(item.answer) for normal in normalise(truth)]
    texts = [truth for truth in truths if isinstance(truth, str)]
    said = parse_open(answer)
    right = any(
        any(truth in one for truth in texts) if isinstance(one, str) else one in truths
        for one in said
    )
    parsed = "; ".join(sorted(map(str, said)))
    return Verdict(float(right), parsed, unanswered=not answer.strip())


def _rule(item: Item, answer: str, benchmark: str) -> Verdict | None:
    return choice(item, answer) if item.options else _open(item, answer)


MMMU = Protocol("mmmu", "MMMU's official evaluation, without random choices", _rule)
