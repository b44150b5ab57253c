"""Scores predictions by named protocols: a verdict for each question, a row for each protocol."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_gmai.evaluate.benchmarks.pandas_numbers import as_pandas_reads
from megatron_gmai.evaluate.benchmarks.table import Benchmark, Item
from megatron_gmai.evaluate.judge import Judge, match_prompt, read_letter, read_yes, same_prompt
from megatron_gmai.evaluate.protocols.verdict import Protocol, Verdict
from megatron_gmai.evaluate.protocols.vlmevalkit import options_and_truth
from megatron_gmai.evaluate.statistics import Interval, bootstrap

# Columns that group scores where a benchmark has them; "kind" is ours.
GROUPS = (
    "kind",
    "answer_type",
    "question_type",
    "modality",
    "department",
    "clinical vqa task",
    "perceptual granularity",
    "content_type",
    "language",
    "organ",
    "category",
    "l2-category",
    "split",
)
_MOST_GROUPS = 100  # a column of more values tells rows apart, it does not group them
_ROTATION = 1_000_000  # VLMEvalKit: rotations of a question have its index plus a multiple of this


@dataclass(frozen=True)
class Scored:
    """The verdict on one question, or on all rotations of one."""

    item: Item
    answer: str
    verdict: Verdict
    judged: bool = False


@dataclass(frozen=True)
class Row:
    """What is reported of a group of questions under a protocol."""

    n: int
    accuracy: float
    interval: Interval
    unanswered: int
    fallbacks: int
    judged: int
    images: int


def kind(item: Item) -> str:
    """multiple_choice, yes_no or open."""
    if item.options:
        return "multiple_choice"
    return "yes_no" if item.answer.strip().lower() in ("yes", "no") else "open"


def join(benchmark: Benchmark, predictions: Mapping[str, str]) -> list[tuple[Item, str]]:
    """Every question with its answer. Raises ValueError if one is missing, for scores of a part are
    no scores of the benchmark, or if nothing says what is right."""
    if not any(item.answer for item in benchmark.items):
        raise ValueError(
            f"{benchmark.name} holds no answers to score by; of test sets whose answers are kept, "
            "predictions go to the authors"
        )
    missing = [item.index for item in benchmark.items if item.index not in predictions]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(benchmark.items)} questions of {benchmark.name} have no "
            f"prediction, first index {missing[0]}; run predict again, it goes on where it stopped"
        )
    return [(item, predictions[item.index]) for item in benchmark.items]


def judge_all(
    protocol: Protocol,
    benchmark: Benchmark,
    answered: Sequence[tuple[Item, str]],
    judge: Judge | None = None,
) -> list[Scored]:
    """Verdicts on all questions for which the protocol has a rule and the benchmark an answer."""
    scored = []
    read = as_pandas_reads(answered) if protocol.reads_by_pandas else answered
    for (item, answer), (seen, said) in zip(answered, read, strict=True):
        verdict = protocol.rule(seen, said, benchmark.name) if item.answer else None
        if verdict is not None:
            scored.append(Scored(item, answer, verdict))
    if judge is not None:
        scored = _ask_judge(protocol, benchmark, answered, scored, judge)
    if protocol.circular and benchmark.circular:
        scored = _whole_circles(scored)
    return scored


def _ask_judge(
    protocol: Protocol,
    benchmark: Benchmark,
    answered: Sequence[tuple[Item, str]],
    scored: Sequence[Scored],
    judge: Judge,
) -> list[Scored]:
    """Judged in place of the rule: choices that it does not match, and open questions."""
    results = {one.item.index: one for one in scored}
    prompts: dict[str, str] = {}
    for item, answer in answered if protocol.judges_open or protocol.judges_choices else ():
        options, _ = options_and_truth(item, benchmark.name)
        before = results.get(item.index)
        if options and protocol.judges_choices and before and before.verdict.unanswered:
            prompts[item.index] = match_prompt(item, options, answer)
        elif protocol.judges_open and item.answer and not options and _is_open(item, before):
            prompts[item.index] = same_prompt(item, answer)
    replies = dict(zip(prompts, judge.replies(list(prompts.values())), strict=True))
    for item, answer in answered:
        if item.index in replies:
            verdict = _judged(item, replies[item.index], benchmark.name)
            results[item.index] = Scored(item, answer, verdict, judged=True)
    return [results[item.index] for item, _ in answered if item.index in results]


def _is_open(item: Item, before: Scored | None) -> bool:
    """Open questions, and those for which there is no other rule."""
    return before is None or kind(item) == "open"


def _judged(item: Item, reply: str, benchmark: str) -> Verdict:
    options, truth = options_and_truth(item, benchmark)
    if options:
        letter = read_letter(reply, list(options))
        return Verdict.none() if letter is None else Verdict.of(letter == truth, letter)
    same = read_yes(reply)
    return Verdict.none() if same is None else Verdict.of(same, "same" if same else "other")


def _whole_circles(scored: Sequence[Scored]) -> list[Scored]:
    """One verdict a question: right only if all of its rotations are. Raises ValueError."""
    circles: dict[int, list[Scored]] = {}
    for one in scored:
        if not one.item.index.isdecimal():
            raise ValueError(f"index {one.item.index} of a circular benchmark is not a number")
        group = one.item.columns.get("g_index", "")
        number = int(group) if group.isdecimal() else int(one.item.index) % _ROTATION
        circles.setdefault(number, []).append(one)
    whole = []
    for number, circle in circles.items():
        main = next((one for one in circle if int(one.item.index) == number), None)
        if main is not None:
            score = min(one.verdict.score for one in circle)
            unanswered = any(one.verdict.unanswered for one in circle)
            fallback = any(one.verdict.fallback for one in circle)
            verdict = replace(main.verdict, score=score, unanswered=unanswered, fallback=fallback)
            whole.append(replace(main, verdict=verdict, judged=any(o.judged for o in circle)))
    return whole


def summarise(scored: Sequence[Scored]) -> Row:
    """Accuracy and interval of these verdicts, of which there must be one."""
    scores = [one.verdict.score for one in scored]
    images = [one.item.image_key for one in scored]
    return Row(
        n=len(scored),
        accuracy=sum(scores) / len(scores),
        interval=bootstrap(scores, images),
        unanswered=sum(one.verdict.unanswered for one in scored),
        fallbacks=sum(one.verdict.fallback for one in scored),
        judged=sum(one.judged for one in scored),
        images=len(set(images)),
    )


def by_group(scored: Iterable[Scored], group: str) -> dict[str, Row]:
    """A row for each value of a column, in alphabetical order; none if no question has it."""
    value: Callable[[Item], str | None] = (
        kind if group == "kind" else lambda item: item.columns.get(group)
    )
    parts: dict[str, list[Scored]] = {}
    for one in scored:
        name = value(one.item)
        if name:
            parts.setdefault(name, []).append(one)
    return {name: summarise(parts[name]) for name in sorted(parts)}


def row_to_json(row: Row) -> dict[str, Any]:
    return {
        "n": row.n,
        "images": row.images,
        "unanswered": row.unanswered,
        "fallbacks": row.fallbacks,
        "judged": row.judged,
        "accuracy": round(row.accuracy, 6),
        "interval_95": [round(row.interval.low, 6), round(row.interval.high, 6)],
    }


def result_to_json(scored: Sequence[Scored]) -> dict[str, Any] | None:
    """All of a protocol's rows; None where it has no rule for any of the questions."""
    if not scored:
        return None
    columns = {"kind"}.union(*(one.item.columns for one in scored))
    groups = {name: by_group(scored, name) for name in GROUPS if name in columns}
    return {
        **row_to_json(summarise(scored)),
        "groups": {
            name: {value: row_to_json(row) for value, row in rows.items()}
            for name, rows in groups.items()
            if 1 < len(rows) <= _MOST_GROUPS
        },
    }
