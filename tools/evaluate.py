"""Asks a checkpoint held-out questions; scores, compares and checks predictions.

    python tools/evaluate.py [predict] --load CHECKPOINT --data HELD_OUT.json [--output FILE.json]
    python tools/evaluate.py predict --load CHECKPOINT --benchmark SET.tsv --output MODEL_SET.tsv
    torchrun --nproc-per-node N tools/evaluate.py ...     N / (TP x PP) copies share the questions
    python tools/evaluate.py score --benchmark SET.tsv --predictions FILE [--html PAGE.html]
    python tools/evaluate.py compare --benchmark SET.tsv PREDICTIONS_A PREDICTIONS_B
    python tools/evaluate.py leakage --benchmark SET.tsv --shards DIR

CHECKPOINT is iter_NNNNNNN or a folder of checkpoints, saved in any layout, or a Hugging Face folder
of either flavour. Answers are generated from the template and the image treatment that the model
was trained with, greedily unless --temperature is given. Those to --data count as right when they
equal the expected ones but for case, spaces and a final full stop.
"""

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_gmai.data.files import write_atomically
from megatron_gmai.evaluate.benchmarks.predictions import FORMATS, write_predictions
from megatron_gmai.evaluate.benchmarks.table import read_benchmark
from megatron_gmai.evaluate.commands import COMMANDS
from megatron_gmai.evaluate.loading import add_layout_flags, for_evaluation, tokenizer_for
from megatron_gmai.evaluate.prompts import STYLES
from megatron_gmai.evaluate.report import questions_hash, settings_path, software
from megatron_gmai.runtime.quiet import quiet_libraries, without_compiler
from megatron_gmai.training.resilience import run_guarded
from megatron_gmai.validation import validate_layout

if TYPE_CHECKING:
    from megatron_gmai.evaluate.predict import BenchmarkQuestions
    from megatron_gmai.evaluate.questions import HeldOut
    from megatron_gmai.model.gmai_vl import GMAIVL
    from megatron_gmai.runtime.world import World


class Parser(argparse.ArgumentParser):
    """Raises where argparse would print: every rank parses, one reports."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists every flag)")


def parser() -> argparse.ArgumentParser:
    flags = Parser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog=f"Other commands: {', '.join(COMMANDS)}; evaluate.py COMMAND --help.",
    )
    flags.add_argument(
        "--load",
        type=Path,
        required=True,
        help="checkpoint, folder of them, or Hugging Face folder",
    )
    asked = flags.add_mutually_exclusive_group(required=True)
    asked.add_argument("--data", type=Path, help="held-out questions (JSON)")
    asked.add_argument("--benchmark", type=Path, help="benchmark (TSV); answers are not scored")
    flags.add_argument(
        "--output",
        type=Path,
        help="scores and answers (JSON); with --benchmark, predictions (tsv, json or xlsx)",
    )
    flags.add_argument(
        "--prompt", choices=list(STYLES), default="vlmevalkit", help="how a benchmark is asked"
    )
    flags.add_argument("--tokenizer", help="sentencepiece model (default: the run's own)")
    flags.add_argument("--batch-size", type=int, default=64, help="questions together (64)")
    flags.add_argument("--max-new-tokens", type=int, default=32, help="longest answer (32)")
    flags.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    flags.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="auto: bf16 on GPU, fp32 on CPU",
    )
    flags.add_argument("--temperature", type=float, default=0.0, help="draws answers (0: greedy)")
    flags.add_argument("--top-p", type=float, default=1.0, help="nucleus that is drawn from (1)")
    flags.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    add_layout_flags(flags)
    return flags


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in COMMANDS:
        add_flags, run, purpose = COMMANDS[words[0]]
        command = Parser(prog=f"evaluate.py {words[0]}", description=purpose)
        add_flags(command)
        run(command.parse_args(words[1:]))
        return
    predict(words[1:] if words[:1] == ["predict"] else words)


def predict(argv: list[str]) -> None:
    """Asks the questions on all ranks and prints the scores."""
    flags = parser().parse_args(argv)
    if flags.batch_size < 1 or flags.max_new_tokens < 1:
        raise ValueError("--batch-size and --max-new-tokens must be at least 1")
    if flags.benchmark and (not flags.output or flags.output.suffix[1:] not in FORMATS):
        raise ValueError(f"--benchmark needs --output FILE.{{{','.join(FORMATS)}}}")
    if flags.temperature < 0 or not 0 < flags.top_p <= 1:
        raise ValueError("--temperature must be at least 0, --top-p above 0 and at most 1")
    if flags.data and flags.temperature:
        raise ValueError("--data is answered greedily; --temperature is for --benchmark")
    quiet_libraries()
    without_compiler()
    from megatron_gmai.evaluate.predict import BenchmarkQuestions
    from megatron_gmai.evaluate.questions import HeldOut
    from megatron_gmai.runtime.world import close_world, open_world
    from megatron_gmai.training.inference import load_for_inference, open_trained

    trained = open_trained(flags.load)
    layout = (flags.tensor_model_parallel_size, flags.pipeline_model_parallel_size)
    config = for_evaluation(trained.config, flags.device, flags.dtype, *layout)
    validate_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
    tokenizer = tokenizer_for(config, flags.tokenizer)
    treatment = (config.data, config.model, tokenizer, flags.max_new_tokens)
    questions: HeldOut | BenchmarkQuestions
    if flags.benchmark:
        questions = BenchmarkQuestions(read_benchmark(flags.benchmark), flags.prompt, *treatment)
    else:
        questions = HeldOut(flags.data, *treatment)

    world = open_world(config)
    model = load_for_inference(trained, config, world)
    if isinstance(questions, HeldOut):
        score_held_out(model, questions, world, flags, trained.path)
    else:
        predict_benchmark(model, questions, world, flags, trained.path)
    close_world()


def score_held_out(
    model: "GMAIVL", questions: "HeldOut", world: "World", flags: argparse.Namespace, load: Path
) -> None:
    """Asks, scores and prints; with --output also writes scores and answers."""
    from megatron_gmai.evaluate.benchmark import evaluate

    first = world.is_first_rank
    report = evaluate(
        model,
        questions,
        questions.tokenizer,
        world.groups,
        flags.batch_size,
        flags.max_new_tokens,
        Progress() if first else lambda done, total: None,
    )
    if first:
        print(f"{load} on {flags.data}, {report.seconds:.1f} s\n\n{report.to_text()}")
    if first and flags.output:
        content = {"load": str(load), "data": str(flags.data), **report.to_json()}
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(flags.output, (json.dumps(content, indent=1) + "\n").encode())


def predict_benchmark(
    model: "GMAIVL",
    questions: "BenchmarkQuestions",
    world: "World",
    flags: argparse.Namespace,
    load: Path,
) -> None:
    """Writes predictions, and beside them how they came about."""
    from megatron_gmai.evaluate.predict import claim, files_hash
    from megatron_gmai.evaluate.predict import predict as predict_all
    from megatron_gmai.evaluate.sampling import Sampling

    sampling = Sampling(flags.temperature, flags.top_p, flags.seed)
    first, answers = world.is_first_rank, flags.output.with_suffix(".answers")
    settings: dict[str, Any] = {
        "software": software(),
        "checkpoint": str(load.resolve()),
        "benchmark_sha256": questions_hash(questions.benchmark),
        "prompt": flags.prompt,
        "decoding": asdict(sampling) if sampling.draws else "greedy",
        "max_new_tokens": flags.max_new_tokens,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "image_size": questions.vision.image_size,
        "pad_to_square": questions.pad_to_square,
    }
    if first:
        # Before anything is asked: a run that was ended may have been of other weights.
        settings["weights_sha256"] = files_hash(load)
        claim(answers, settings)
    predicted = predict_all(
        model,
        questions,
        world.groups,
        flags.batch_size,
        flags.max_new_tokens,
        answers,
        Progress() if first else lambda done, total: None,
        sampling,
    )
    if not first:
        return
    texts = {index: answer["prediction"] for index, answer in predicted.items()}
    write_predictions(flags.output, questions.benchmark, texts)
    skipped = {i: answer["skipped"] for i, answer in predicted.items() if "skipped" in answer}
    settings["skipped"] = skipped
    text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
    write_atomically(settings_path(flags.output), text.encode())
    shutil.rmtree(answers)
    print(f"{len(texts)} predictions, {len(skipped)} of questions not asked: {flags.output}")


class Progress:
    """A line every few seconds: questions done, speed, time left."""

    INTERVAL_S = 5.0

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last < self.INTERVAL_S and done < total:
            return
        self.last = now
        speed = done / max(now - self.start, 1e-9)
        print(
            f"{done} of {total} questions, {speed:.1f}/s, {(total - done) / speed:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    run_guarded(main)
