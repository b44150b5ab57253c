"""Ask a model every question of a held-out file, over all ranks, and report the scores."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_gmai.data.text.tokenizer import Tokenizer
from megatron_gmai.evaluate.generate import generate
from megatron_gmai.evaluate.questions import Asked, HeldOut, Skipped, batches
from megatron_gmai.evaluate.scoring import Answer, Score, score_by, table
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.runtime.groups import Groups


@dataclass(frozen=True)
class Report:
    """Answers and what could not be asked, in the order of the file."""

    answers: list[Answer]
    skipped: list[Skipped]
    seconds: float

    @property
    def overall(self) -> Score:
        return Score.of(self.answers)

    @property
    def by_question_type(self) -> dict[str, Score]:
        return score_by(self.answers, lambda question: question.question_type)

    @property
    def by_class(self) -> dict[str, Score]:
        return score_by(self.answers, lambda question: question.class_name)

    def to_json(self) -> dict[str, Any]:
        """Accuracies overall and by group, every answer, and every skipped record's reason."""
        return {
            "accuracy": self.overall.accuracy,
            "correct": self.overall.correct,
            "asked": self.overall.asked,
            "by_question_type": {k: v.accuracy for k, v in self.by_question_type.items()},
            "by_class": {k: v.accuracy for k, v in self.by_class.items()},
            "seconds": round(self.seconds, 2),
            "samples": [_sample(answer) for answer in self.answers],
            "skipped": [{"id": one.key, "reason": one.reason} for one in self.skipped],
        }

    def to_text(self) -> str:
        """The scores as tables for a terminal."""
        parts = [
            table("question type", self.by_question_type),
            table("class", self.by_class),
            table("", {"overall": self.overall}),
        ]
        if self.skipped:
            first = self.skipped[0]
            parts.append(
                f"{len(self.skipped)} of {len(self.skipped) + len(self.answers)} records were "
                f"skipped and are not in the scores; the first, {first.key}: {first.reason}"
            )
        return "\n\n".join(parts)


def evaluate(
    model: GMAIVL,
    held_out: HeldOut,
    tokenizer: Tokenizer,
    groups: Groups,
    batch_size: int,
    max_new_tokens: int,
    progress: Callable[[int, int], None],
) -> Report:
    """Answers from all data-parallel ranks, each asking its share; every rank gets the report.

    `progress` is called after each batch with the records done by this rank and its share. Raises
    ValueError if no record can be asked.
    """
    begun = time.monotonic()
    share = range(groups.dp.rank(), len(held_out), groups.dp.size())
    stop_id = tokenizer.special_id(held_out.template.end_of_answer)
    answers: list[Answer] = []
    skipped: list[Skipped] = []
    for batch in batches(held_out, share, batch_size):
        asked = [one for one in batch if isinstance(one, Asked)]
        skipped += [one for one in batch if isinstance(one, Skipped)]
        if asked:
            prompts = [one.prompt for one in asked]
            ids = generate(model, prompts, stop_id, max_new_tokens)
            texts = [tokenizer.decode(one).strip() for one in ids]
            answers += [Answer(a.question, t) for a, t in zip(asked, texts, strict=True)]
        progress(len(answers) + len(skipped), len(share))
    answers, skipped = _from_all_ranks(answers, groups), _from_all_ranks(skipped, groups)
    answers.sort(key=lambda answer: answer.question.number)
    skipped.sort(key=lambda one: one.number)
    if not answers:
        raise ValueError(f"none of {len(skipped)} records can be asked: {skipped[0].reason}")
    return Report(answers, skipped, time.monotonic() - begun)


def _from_all_ranks(mine: list[Any], groups: Groups) -> list[Any]:
    shares: list[Any] = [None] * groups.dp.size()
    dist.all_gather_object(shares, mine, group=groups.dp)
    return [one for share in shares for one in share]


def _sample(answer: Answer) -> dict[str, Any]:
    question = answer.question
    return {
        "id": question.key,
        "question_type": question.question_type,
        "class": question.class_name,
        "question": question.text,
        "expected": question.expected,
        "answer": answer.text,
        "correct": answer.correct,
    }
