"""Asks a checkpoint held-out questions and prints its accuracy per question type and class.

    python tools/evaluate.py --load CHECKPOINT --data HELD_OUT.json [--output FILE.json]
    torchrun --nproc-per-node N tools/evaluate.py ...     the questions are shared by N ranks

CHECKPOINT is iter_NNNNNNN or a folder of checkpoints, saved in any layout. Answers are generated
greedily from the template and the image treatment that the model was trained with, and count as
right when they equal the expected ones but for case, spaces and a final full stop.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from megatron_gmai.config import Config, ParallelConfig, TrainConfig
from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_gmai.runtime.quiet import quiet_libraries
from megatron_gmai.training.resilience import run_guarded
from megatron_gmai.validation import validate_layout


class Parser(argparse.ArgumentParser):
    """Raises where argparse would print: every rank parses, one reports."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists every flag)")


def parser() -> argparse.ArgumentParser:
    flags = Parser(description=(__doc__ or "").split("\n\n")[0])
    flags.add_argument("--load", type=Path, required=True, help="checkpoint, or folder of them")
    flags.add_argument("--data", type=Path, required=True, help="held-out questions (JSON)")
    flags.add_argument("--output", type=Path, help="write scores and every answer here (JSON)")
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
    flags.add_argument(
        "--tensor-model-parallel-size",
        "--tp",
        type=int,
        default=1,
        help="ranks that share each layer (1)",
    )
    return flags


def main(argv: list[str] | None = None) -> None:
    flags = parser().parse_args(argv)
    if flags.batch_size < 1 or flags.max_new_tokens < 1:
        raise ValueError("--batch-size and --max-new-tokens must be at least 1")
    quiet_libraries()
    from megatron_gmai.evaluate.benchmark import evaluate
    from megatron_gmai.evaluate.questions import HeldOut
    from megatron_gmai.model.gmai_vl import build_chunks
    from megatron_gmai.runtime.world import close_world, open_world
    from megatron_gmai.training.checkpoint import load_checkpoint, open_checkpoint

    checkpoint = open_checkpoint(flags.load)
    config = for_evaluation(checkpoint.config, flags)
    validate_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
    tokenizer = tokenizer_for(config, flags.tokenizer)
    held_out = HeldOut(flags.data, config.data, config.model, tokenizer, flags.max_new_tokens)

    world = open_world(config)
    (model,) = build_chunks(config, world)
    model.requires_grad_(False).eval()
    load_checkpoint(checkpoint, [model], optimizer=None)

    first = world.is_first_rank
    report = evaluate(
        model,
        held_out,
        tokenizer,
        world.groups,
        flags.batch_size,
        flags.max_new_tokens,
        Progress() if first else lambda done, total: None,
    )
    if first:
        print(f"{checkpoint.path} on {flags.data}, {report.seconds:.1f} s\n\n{report.to_text()}")
        if flags.output:
            told = {"load": str(checkpoint.path), "data": str(flags.data), **report.to_json()}
            flags.output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(flags.output, (json.dumps(told, indent=1) + "\n").encode())
    close_world()


def for_evaluation(config: Config, flags: argparse.Namespace) -> Config:
    """The trained model and its treatment of data, in another layout and without training."""
    parallel = ParallelConfig(tensor_model_parallel_size=flags.tensor_model_parallel_size)
    run = dataclasses.replace(config.run, device=flags.device, dtype=flags.dtype)
    return dataclasses.replace(config, parallel=parallel, train=TrainConfig(), run=run)


def tokenizer_for(config: Config, given: str | None) -> Tokenizer:
    """The tokenizer that was given or that the run used. Raises ValueError for another model's."""
    path = given or config.data.tokenizer
    if path is None:
        raise ValueError("the checkpoint names no tokenizer; give --tokenizer FILE")
    tokenizer, model = load_tokenizer(path), config.model
    too_large = tokenizer.vocab_size > model.language.vocab_size
    if too_large or tokenizer.image_token_id != model.image_token_id:
        raise ValueError(
            f"the tokenizer {path} has {tokenizer.vocab_size} ids and <image> as number "
            f"{tokenizer.image_token_id}; the model has {model.language.vocab_size} and "
            f"{model.image_token_id}. Give --tokenizer the file that the model was trained with."
        )
    return tokenizer


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
