"""The result of scoring one prediction file: JSON for machines, a table for people."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_gmai.data.ledger import visible
from megatron_gmai.evaluate.benchmarks.table import Benchmark
from megatron_gmai.evaluate.protocols.registry import PROTOCOLS, RULE_VERSION
from megatron_gmai.evaluate.scores import Scored, result_to_json

SETTINGS_SUFFIX = ".settings.json"  # beside a prediction file: how it came about
OTHER_QUESTIONS = "{} was made for other questions, options, answers or images than these"


@dataclass(frozen=True)
class Scores:
    """Verdicts of each protocol on one prediction file, and all that tells how they came about."""

    benchmark: Benchmark
    predictions: Path
    verdicts: Mapping[str, Sequence[Scored]]  # protocol -> verdicts
    judge: str | None = None
    leaked: AbstractSet[str] | None = None  # indices of questions whose image is in the training

    def to_json(self) -> dict[str, Any]:
        return {
            "rule_version": RULE_VERSION,
            "software": software(),
            "benchmark": {
                "name": self.benchmark.name,
                "questions": len(self.benchmark.items),
                "rows_without_image": self.benchmark.without_image,
                "answers_not_among_options": _no_option(self.benchmark),
                "sha256": questions_hash(self.benchmark),
            },
            "predictions": {
                "file": self.predictions.name,
                "sha256": hashlib.sha256(self.predictions.read_bytes()).hexdigest(),
                "settings": read_settings(self.predictions),
                "of_these_questions": of_these_questions(self.predictions, self.benchmark),
            },
            "judge": self.judge,
            "leaked": None if self.leaked is None else len(self.leaked),
            "protocols": {name: self._protocol(name) for name in self.verdicts},
        }

    def _protocol(self, name: str) -> dict[str, Any]:
        scored = self.verdicts[name]
        result = {"source": PROTOCOLS[name].source, "all": result_to_json(scored)}
        if self.leaked is not None:
            result["without_leaked"] = result_to_json(self._clean(scored))
        return result

    def _clean(self, scored: Sequence[Scored]) -> list[Scored]:
        return [one for one in scored if one.item.index not in (self.leaked or ())]


def to_table(result: Mapping[str, Any], by: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """A head and a row for each protocol that has a rule for any of the questions, with rows below
    it for each value of the columns `by`."""
    rows: list[tuple[str, ...]] = [
        ("protocol", "accuracy", "95 % interval", "n", "unanswered", "fallbacks", "judged")
    ]
    for name, protocol in result["protocols"].items():
        if protocol["all"]:
            rows.append(_cells(name, protocol["all"]))
        if protocol.get("without_leaked"):
            rows.append(_cells("  without leaked images", protocol["without_leaked"]))
        groups = (protocol["all"] or {}).get("groups", {})
        for column in by:
            rows += [_cells(f"  {value}", row) for value, row in groups.get(column, {}).items()]
    return rows


def to_text(result: Mapping[str, Any], by: Sequence[str] = ()) -> str:
    """The table for a terminal; protocols without a rule for any question are named below it."""
    rows = to_table(result, by)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    lines += to_notes(result)
    return "\n".join([f"{result['benchmark']['name']}, {result['predictions']['file']}", *lines])


def to_notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the scores must know of them."""
    notes = []
    silent = [name for name, protocol in result["protocols"].items() if not protocol["all"]]
    if silent:
        notes.append(f"no rule for these questions: {', '.join(silent)}")
    odd = result["benchmark"]["answers_not_among_options"]
    if odd:
        notes.append(
            f"{len(odd)} questions with options have an answer that is the letter of none of them, "
            f"first index {visible(odd[0])}: no choice is right there"
        )
    if result["predictions"]["of_these_questions"] is False:
        notes.append(OTHER_QUESTIONS.format(result["predictions"]["file"]))
    return notes


def _no_option(benchmark: Benchmark) -> list[str]:
    """Indices of questions whose answer is not the letter of an option. Toolkits compare letters as
    they are spelled, so "a", "(A)", "A, B" and the option's text are none."""
    return [
        item.index
        for item in benchmark.items
        if item.options and item.answer and item.answer not in item.options
    ]


def of_these_questions(predictions: Path, benchmark: Benchmark) -> bool | None:
    """Whether predictions were made for the questions, options, answers and images that the
    benchmark has now; None where nothing beside them says so."""
    settings = read_settings(predictions) or {}
    made_for = settings.get("benchmark_sha256")
    return None if made_for is None else made_for == questions_hash(benchmark)


def _cells(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = row["interval_95"]
    counts = (str(row[key]) for key in ("n", "unanswered", "fallbacks", "judged"))
    return (visible(name), f"{row['accuracy']:.4f}", f"{low:.4f} - {high:.4f}", *counts)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    name, *cells = row
    return f"{name:<{widths[0]}}" + "".join(
        f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)
    )


def questions_hash(benchmark: Benchmark) -> str:
    """SHA-256 of what is asked and what is right, whatever else the file holds."""
    digest = hashlib.sha256()
    for item in benchmark.items:
        fields = [item.index, item.hint, item.question, item.options, item.answer, item.image_key]
        digest.update(json.dumps(fields).encode())
    return digest.hexdigest()


def software() -> str:
    try:
        return f"megatron-gmai {version('megatron-gmai')}"
    except PackageNotFoundError:
        return "megatron-gmai, not installed"


def settings_path(predictions: Path) -> Path:
    return predictions.with_suffix(SETTINGS_SUFFIX)


def read_settings(predictions: Path) -> dict[str, Any] | None:
    """What `predict` wrote beside its file: prompt, generation, weights; None for foreign files."""
    path = settings_path(predictions)
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return settings if isinstance(settings, dict) else None
