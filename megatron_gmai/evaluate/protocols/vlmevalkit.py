"""VLMEvalKit's exact matching (e8e78f05, 2026-08-18), now and before "the answer is X" counted.

An answer is matched to an option by its letter, else by its text (`match_option`). Yes/no answers
count if just one of the two words is there. Open questions are left to a judge model there, so
without one there is no score. Two traits of reading its files with pandas are kept: options such as
"None" or "NA" do not exist, and such answers read "nan".
"""

import re
import string
from collections.abc import Mapping

from megatron_gmai.evaluate.benchmarks.table import Item
from megatron_gmai.evaluate.benchmarks.write import PANDAS_MISSING
from megatron_gmai.evaluate.protocols.verdict import Protocol, Verdict, is_yes_no
from megatron_gmai.evaluate.protocols.words import strip_punctuation

NO_OPTION = "Z"
_SIGNS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_API_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_LAST_WORDS = 4  # a letter counts only if it is first met among them
_ANSWER_IS = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")


def match_option(answer: str, options: Mapping[str, str], phrases: bool = True) -> str | None:
    """The letter of an option, Z for a refusal, None if nothing matches.

    `phrases`: whether "the answer is X" counts, as in newer releases.
    """
    return _by_letter(answer, options, phrases) or _by_text(answer, options)


def _by_letter(answer: str, options: Mapping[str, str], phrases: bool) -> str | None:
    if _API_FAILED in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return NO_OPTION
    words = answer.translate(_SIGNS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return named[0]
    if not named and NO_OPTION in words:
        return NO_OPTION
    said = _ANSWER_IS.search(answer) if phrases else None
    letter = said.group(1).upper() if said else None
    return letter if letter in options else None


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    answer = answer.lower()
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in options.items() if text.lower() in answer]
    return named[0] if len(named) == 1 else None


def extract_yes_no(answer: str) -> str:
    """`Yes`, `No` or `Unknown`."""
    words = strip_punctuation(answer.lower()).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def _rule(item: Item, answer: str, benchmark: str, phrases: bool = True) -> Verdict | None:
    options, truth = options_and_truth(item, benchmark)
    answer = "nan" if answer == "" or answer in PANDAS_MISSING else answer
    if options:
        letter = match_option(answer, options, phrases)
        if letter is None or letter == NO_OPTION:
            return Verdict.none(float(letter == truth))
        return Verdict.of(letter == truth, letter)
    if is_yes_no(truth) and not benchmark.startswith("PathVQA"):  # which only a judge scores there
        said = extract_yes_no(answer)
        if said == "Unknown":
            return Verdict.none()
        return Verdict.of(said.lower() == truth.strip().lower(), said)
    return None


def options_and_truth(item: Item, benchmark: str) -> tuple[dict[str, str], str]:
    """What VLMEvalKit offers; an open question of MMMU becomes a choice of the answer or others."""
    options = {c: text for c, text in item.options.items() if text not in PANDAS_MISSING}
    if "MMMU" not in benchmark:
        return options, item.answer
    if "A" not in options:
        options |= {"A": item.answer, "B": "Other Answers"}
    is_letter = len(item.answer) == 1 and item.answer in string.ascii_uppercase
    return dict(sorted(options.items())), item.answer if is_letter else "A"


def _rule_2024(item: Item, answer: str, benchmark: str) -> Verdict | None:
    return _rule(item, answer, benchmark, phrases=False)


VLMEVALKIT = Protocol(
    "vlmevalkit",
    "VLMEvalKit e8e78f05 (2026-08-18), exact matching",
    _rule,
    reads_by_pandas=True,
    circular=True,
    judges_choices=True,
    judges_open=True,
)
VLMEVALKIT_2024 = Protocol(
    "vlmevalkit-2024",
    'VLMEvalKit without the phrase "the answer is X", exact matching',
    _rule_2024,
    reads_by_pandas=True,
    circular=True,
    judges_choices=True,
    judges_open=True,
)
