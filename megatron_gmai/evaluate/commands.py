"""What `tools/evaluate.py` does with predictions that are there: score, compare, leakage."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.ledger import visible
from megatron_gmai.evaluate.benchmarks.predictions import read_predictions
from megatron_gmai.evaluate.benchmarks.table import Benchmark, read_benchmark
from megatron_gmai.evaluate.judge import Judge, openai_ask
from megatron_gmai.evaluate.page import render_page
from megatron_gmai.evaluate.protocols.registry import PROTOCOLS
from megatron_gmai.evaluate.protocols.verdict import Protocol
from megatron_gmai.evaluate.report import (
    OTHER_QUESTIONS,
    Scores,
    of_these_questions,
    questions_hash,
    to_notes,
    to_table,
    to_text,
)
from megatron_gmai.evaluate.scores import GROUPS, join, judge_all
from megatron_gmai.evaluate.statistics import paired_test

JUDGE_KEY = "JUDGE_API_KEY"  # environment variable


def score_parser(flags: argparse.ArgumentParser) -> None:
    _add_common(flags)
    flags.add_argument("--predictions", type=Path, required=True, help="tsv, json or xlsx")
    flags.add_argument(
        "--by", action="append", default=[], choices=GROUPS, help="rows for each of its values too"
    )
    flags.add_argument("--output", type=Path, help="result (JSON); has all groups")
    flags.add_argument("--html", type=Path, help="page of cases with their pictures")
    flags.add_argument("--leaks", type=Path, help="result of `leakage`: scores without it as well")
    flags.add_argument("--judge-model", help="a judge model decides what rules leave open")
    flags.add_argument(
        "--judge", help=f"its OpenAI-shaped address (key: ${JUDGE_KEY}); without, stored answers"
    )
    flags.add_argument("--judge-answers", type=Path, help="default: beside the predictions")


def score(flags: argparse.Namespace) -> None:
    """Prints a row for each protocol; writes the result and the page where they are asked for."""
    benchmark = read_benchmark(flags.benchmark)
    answered = join(benchmark, read_predictions(flags.predictions))
    judge = _judge(flags)
    verdicts = {
        protocol.name: judge_all(protocol, benchmark, answered, judge)
        for protocol in _protocols(flags.protocol)
    }
    leaked = None if flags.leaks is None else _read_leaks(flags.leaks, benchmark)
    scores = Scores(benchmark, flags.predictions, verdicts, flags.judge_model, leaked)
    result = scores.to_json()
    print(to_text(result, flags.by))
    if flags.output:
        _write(flags.output, json.dumps(result, indent=1) + "\n")
    if flags.html:
        title = f"{benchmark.name}: {flags.predictions.stem}"
        table, notes = to_table(result, flags.by), to_notes(result)
        _write(flags.html, render_page(benchmark, verdicts, table, notes, title))


def compare_parser(flags: argparse.ArgumentParser) -> None:
    _add_common(flags)
    flags.add_argument("first", type=Path, help="predictions of model A")
    flags.add_argument("second", type=Path, help="predictions of model B")
    flags.add_argument("--output", type=Path, help="result (JSON)")


def compare(flags: argparse.Namespace) -> None:
    """Prints, for each protocol, how much better B is than A, with interval and p-value."""
    benchmark = read_benchmark(flags.benchmark)
    both = [join(benchmark, read_predictions(path)) for path in (flags.first, flags.second)]
    result = {}
    print(f"{benchmark.name}: A is {flags.first.name}, B is {flags.second.name}")
    print(
        f"{'protocol':<16}{'A':>8}{'B':>8}{'B - A':>9}  {'95 % interval':<18}{'p':>8}{'images':>8}"
    )
    for protocol in _protocols(flags.protocol):
        first, second = (judge_all(protocol, benchmark, answered) for answered in both)
        if not first:
            continue
        a, b = ([one.verdict.score for one in scored] for scored in (first, second))
        test = paired_test(a, b, [one.item.image_key for one in first])
        means = [sum(scores) / len(scores) for scores in (a, b)]
        interval = f"{test.interval.low:+.4f} {test.interval.high:+.4f}"
        print(
            f"{protocol.name:<16}{means[0]:>8.4f}{means[1]:>8.4f}{test.difference:>+9.4f}  "
            f"{interval:<18}{test.p_value:>8.4f}{test.images:>8}"
        )
        result[protocol.name] = {"a": means[0], "b": means[1], "n": len(a), **asdict(test)}
    for path in (flags.first, flags.second):
        if of_these_questions(path, benchmark) is False:
            print(OTHER_QUESTIONS.format(path.name))
    if flags.output:
        _write(flags.output, json.dumps(result, indent=1) + "\n")


def leakage_parser(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--benchmark", type=Path, required=True, help="TSV")
    flags.add_argument("--shards", type=Path, required=True, help="folder of training shards")
    flags.add_argument("--hashes", type=Path, help="folder for their hashes (default: the shards')")
    flags.add_argument("--distance", type=int, default=15, help="bits of 256 that may differ (15)")
    flags.add_argument("--output", type=Path, help="result (JSON), for `score --leaks`")


def leakage(flags: argparse.Namespace) -> None:
    """Prints how many images of a benchmark are in the training, and writes which."""
    from megatron_gmai.evaluate.leakage.check import find_leaks

    benchmark = read_benchmark(flags.benchmark)
    leaks = find_leaks(benchmark, flags.shards, flags.hashes, flags.distance, _hashing)
    print(leaks.to_text())
    for match in leaks.matches[:20]:
        sign = "=" if match["exact"] else f"{match['distance']:>2} bits"
        questions = visible(", ".join(match["indices"][:5]))
        print(f"  {questions}  {sign}  {visible(match['training_key'])}")
    if flags.output:
        content = {"benchmark_sha256": questions_hash(benchmark), **asdict(leaks)}
        _write(flags.output, json.dumps(content, indent=1) + "\n")


Command = tuple[
    Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None], str
]
COMMANDS: dict[str, Command] = {
    "score": (score_parser, score, "Scores predictions by named protocols."),
    "compare": (compare_parser, compare, "Compares two models on the same questions."),
    "leakage": (leakage_parser, leakage, "Looks for a benchmark's images in training shards."),
}


def _add_common(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--benchmark", type=Path, required=True, help="TSV")
    flags.add_argument(
        "--protocol", action="append", choices=list(PROTOCOLS), help="repeatable (default: all)"
    )


def _protocols(names: list[str] | None) -> list[Protocol]:
    return [PROTOCOLS[name] for name in names or PROTOCOLS]


def _judge(flags: argparse.Namespace) -> Judge | None:
    if flags.judge_model is None:
        if flags.judge:
            raise ValueError("--judge needs --judge-model NAME: its answers are stored by name")
        return None
    store = flags.judge_answers or flags.predictions.with_suffix(".judge.jsonl")
    key = os.environ.get(JUDGE_KEY)
    ask = openai_ask(flags.judge, flags.judge_model, key) if flags.judge else None
    return Judge(flags.judge_model, store, ask)


def _read_leaks(path: Path, benchmark: Benchmark) -> set[str]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        name, matches = loaded["benchmark"], loaded["matches"]
        indices = {str(index) for match in matches for index in match["indices"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a result of `leakage`: {error}") from error
    if name != benchmark.name:
        raise ValueError(f"{path} is about {name}, not {benchmark.name}")
    if loaded.get("benchmark_sha256") not in (None, questions_hash(benchmark)):
        raise ValueError(f"{path} is about other questions of {name}; run leakage again")
    return indices


def _hashing(done: int, total: int) -> None:
    if sys.stderr.isatty() or done == total:
        print(f"\rhashed {done} of {total} samples", end="", file=sys.stderr, flush=True)
        if done == total:
            print(file=sys.stderr)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode("utf-8"))
    print(f"written: {path}")
