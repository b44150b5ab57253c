"""MedEvalKit's rules (9b12e3b, 2026-02-24), which stand behind Lingshu's tables.

An option that cannot be read is replaced by the one most like the text, so nothing is unanswered.
Yes/no is right if the truth is a part of the answer and only one of "yes" and "no" is, also inside
other words: "normal" says no. Open answers must be equal after lower-casing; a judge model is on by
default there. Its open answers of MMMU are never parsed and always wrong.
"""

import re

from megatron_gmai.evaluate.benchmarks.table import Item
from megatron_gmai.evaluate.protocols import mmmu
from megatron_gmai.evaluate.protocols.similarity import most_similar
from megatron_gmai.evaluate.protocols.verdict import Protocol, Verdict

_BOXED = r"\boxed{"
# In the order in which the text behind each is taken.
_ANSWER_MARKS = (
    "**answer**:",
    "**answer**",
    "*answer*:",
    "**answer:**",
    "answer is",
    "answer:",
    "答案:",
    "final answer",
    "final answer is",
)
_TAGGED = re.compile("<answer>(.*?)</answer>", re.DOTALL)
_NOT_BOXED = "None"  # what its library gives for text without a box


def boxed(text: str) -> str:
    """What stands in the last box of LaTeX."""
    start = text.rfind(_BOXED)
    depth = 0
    for position in range(start + len(_BOXED), len(text) if start >= 0 else 0):
        if text[position] == "}" and depth == 0:
            return text[start + len(_BOXED) : position].strip()
        depth += {"{": 1, "}": -1}.get(text[position], 0)
    return _NOT_BOXED


def tagged(text: str) -> str:
    """What stands between answer tags; the text itself if nothing does."""
    return " ".join(_TAGGED.findall(text)).strip() or text


def final_answer(text: str) -> str:
    """The part that states the answer, in lower case."""
    text = text.lower()
    if "boxed" in text:
        text = boxed(text)
    elif "<answer>" in text:
        text = tagged(text)
    for mark in _ANSWER_MARKS:
        text = text.rpartition(mark)[2]
    return text


def _from_box_or_tag(text: str) -> str:
    return boxed(text) if boxed(text) != _NOT_BOXED else tagged(text)


def choose(options: list[str], answer: str) -> tuple[int, bool]:
    """Index of the option that is taken, and whether it is the most similar one, as a fallback."""
    letters = [chr(ord("a") + position) for position in range(len(options))]
    options = [option.lower() for option in options]
    text = answer.lower()
    paragraphs = text.split("\n\n")
    last = paragraphs[-1].split(".")[0]
    if paragraphs[0] in letters:
        text = paragraphs[0]
    elif last in letters:
        text = last
    text = final_answer(text).strip().lower().replace("\n", "")
    said = text.split(".")[0].split(":")[-1]
    if said in letters:
        return letters.index(said), False
    if said in options:
        return options.index(said), False
    return most_similar(options, text) or 0, True


def _choice(item: Item, answer: str, benchmark: str) -> Verdict:
    letters, texts = list(item.options), list(item.options.values())
    if benchmark.lower().startswith("omnimedvqa"):
        texts = [f"{letter}. {text}" for letter, text in item.options.items()]
        answer = tagged(answer)
    elif benchmark.lower().startswith("pmc"):
        # The published choices carry their letters.
        texts = [f"{letter}:{text}" for letter, text in item.options.items()]
    position, fallback = choose(texts, answer)
    # Options of the same text are one.
    right = item.answer in letters and (
        letters[position] == item.answer or texts[position] == texts[letters.index(item.answer)]
    )
    return Verdict.of(right, letters[position], fallback)


def _rule(item: Item, answer: str, benchmark: str) -> Verdict | None:
    if benchmark.upper().startswith("MMMU"):
        answer = tagged(answer) if "<answer>" in answer else answer
        answer = boxed(answer) if "\\boxed" in answer else answer
        return mmmu.choice(item, answer) if item.options else Verdict.none()
    if item.options:
        return _choice(item, answer, benchmark)
    said = final_answer(_from_box_or_tag(answer))
    truth, plain = item.answer.lower(), said.replace("\n", "").replace(".", "")
    if not benchmark.upper().startswith("SLAKE"):
        said = final_answer(_from_box_or_tag(answer).lower().strip())
        truth = truth.strip()
        return _yes_no(truth, plain) if truth in ("yes", "no") else _open(truth, said)
    if item.columns.get("answer_type", "").strip().upper() == "OPEN":
        return _open(truth, said)
    # Only truths in lower case are known as yes or no there.
    return _yes_no(truth, plain) if item.answer in ("yes", "no") else _open(truth, plain)


def _yes_no(truth: str, said: str) -> Verdict:
    if ("yes" in said) == ("no" in said):
        return Verdict.none()
    return Verdict.of(truth in said, "yes" if "yes" in said else "no")


def _open(truth: str, said: str) -> Verdict:
    return Verdict.of(said == truth, said) if said else Verdict.none()


MEDEVALKIT = Protocol("medevalkit", "MedEvalKit 9b12e3b (2026-02-24)", _rule, judges_open=True)
