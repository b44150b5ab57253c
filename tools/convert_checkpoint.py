"""Converts between training checkpoints and Hugging Face folders, and compares any two of them.

    python tools/convert_checkpoint.py from-hf --model DIR --output CHECKPOINTS
    python tools/convert_checkpoint.py from-hf --llm DIR --vision DIR --output CHECKPOINTS
    python tools/convert_checkpoint.py to-hf --load CHECKPOINT --output DIR [--flavour gmai-vl]
    python tools/convert_checkpoint.py to-peft --load CHECKPOINT --output DIR
    python tools/convert_checkpoint.py verify A B
    torchrun --nproc-per-node 4 tools/convert_checkpoint.py verify A B --tp 2 --pp 2

`from-hf` reads either flavour, or a language model and a CLIP, and writes weights to start from
with `--load`. `to-hf` reads a checkpoint of any layout, and merges adapters; `to-peft` writes them
alone. All go tensor by tensor and keep the dtype unless told otherwise. `verify` exits with 1 where
the two differ; in a layout, A is what its ranks hold and say.
"""

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from megatron_gmai.config import Config, DataConfig, ParallelConfig
from megatron_gmai.convert.adapters import changed_towers, open_base, open_trained
from megatron_gmai.convert.carried import read_carried
from megatron_gmai.convert.compare import Side, card, compare, only_in_one, table
from megatron_gmai.convert.distributed import CheckpointWeights
from megatron_gmai.convert.huggingface import (
    Pretrained,
    check_tokenizer,
    existing_folder,
    is_hugging_face,
    open_pretrained,
    open_separate,
    write_pretrained,
)
from megatron_gmai.convert.manifest import Manifest, read_manifest
from megatron_gmai.convert.mapping import Flavour
from megatron_gmai.convert.output import Progress, not_counted
from megatron_gmai.convert.peft_adapter import write_peft
from megatron_gmai.convert.training_checkpoint import write_training_checkpoint
from megatron_gmai.convert.write import export_shapes
from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_gmai.evaluate.loading import add_layout_flags
from megatron_gmai.runtime.quiet import quiet_libraries
from megatron_gmai.tokenizer_file import tokenizer_file
from megatron_gmai.training.resilience import run_guarded
from megatron_gmai.weights import in_words, parameters

if TYPE_CHECKING:
    from megatron_gmai.verification.ranks import Ranks

_TRAINING = "training checkpoint"
_FINAL_NORM = "language_model.decoder.final_layernorm.weight"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where `verify` found a difference, 2 after a mistake that the
    message explains."""
    flags = _parser().parse_args(argv)
    quiet_libraries()
    try:
        with _stopped_by_exceptions():
            return int(flags.command(flags))
    except (ValueError, OSError) as error:
        if "RANK" in os.environ:  # of torchrun: one rank tells it, and all end
            raise
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2


@contextmanager
def _stopped_by_exceptions() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl-C does, so that half-written folders are removed."""

    def stop(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    directions = parser.add_subparsers(dest="direction", required=True)
    out = directions.add_parser("to-hf", help="training checkpoint -> Hugging Face folder")
    out.set_defaults(command=to_hf)
    out.add_argument("--load", required=True, help="iter_NNNNNNN, or a folder of checkpoints")
    out.add_argument("--output", required=True, help="folder to write; new or empty")
    out.add_argument(
        "--flavour",
        choices=("transformers", "gmai-vl"),
        default="transformers",
        help="transformers: no remote code (default); gmai-vl: for GMAI-VL's own code",
    )
    out.add_argument("--tokenizer", help="sentencepiece model (default: the run's own)")
    out.add_argument(
        "--llava",
        help="Hugging Face folder with the CLIP parts that training never runs (default: what the "
        "checkpoint carries)",
    )
    out.add_argument("--dtype", choices=DTYPES, help="default: that of the checkpoint")
    _add_base(out)
    out.add_argument(
        "--without-adapters",
        action="store_true",
        help="leave adapters out: the model that to-peft's result goes on top of",
    )
    peft = directions.add_parser("to-peft", help="adapters of a checkpoint -> PEFT's format")
    peft.set_defaults(command=to_peft)
    peft.add_argument("--load", required=True, help="iter_NNNNNNN, or a folder of checkpoints")
    peft.add_argument("--output", required=True, help="folder to write; new or empty")
    peft.add_argument("--dtype", choices=DTYPES, help="default: that of the checkpoint")
    _add_base(peft)
    back = directions.add_parser("from-hf", help="Hugging Face folder -> training checkpoint")
    back.set_defaults(command=from_hf)
    back.add_argument("--model", help="a whole model: original or transformers flavour")
    back.add_argument("--llm", help="language model alone: InternLM2 or Llama")
    back.add_argument("--vision", help="CLIP alone, to go with --llm")
    back.add_argument("--output", required=True, help="folder of checkpoints; new or empty")
    back.add_argument("--tokenizer", help="sentencepiece model (default: the folder's own)")
    back.add_argument("--dtype", choices=DTYPES, help="default: that of each tensor")
    back.add_argument("--seed", type=int, default=42, help="of a new projector (42)")
    both = directions.add_parser("verify", help="compare two checkpoints, of whichever kind")
    both.set_defaults(command=verify)
    both.add_argument("a", type=Path, help="training checkpoint or Hugging Face folder")
    both.add_argument("b", type=Path, help="another one")
    _add_base(both)
    both.add_argument("--tolerance", type=float, default=0.0, help="largest difference allowed (0)")
    both.add_argument(
        "--card", type=Path, help="default: B/card.json if B is a Hugging Face folder"
    )
    add_layout_flags(both)
    return parser


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        type=Path,
        help="Hugging Face folder or training checkpoint that adapters lie on (default: what the "
        "run began with)",
    )


def to_hf(flags: argparse.Namespace) -> int:
    """Training checkpoint -> Hugging Face folder. Raises ValueError for the user's mistakes."""
    checkpoint = read_manifest(Path(flags.load))
    config = checkpoint.config
    weights = open_trained(checkpoint, flags.base, not flags.without_adapters)
    file = tokenizer_file(flags.tokenizer or config.data.tokenizer)
    tokenizer = load_tokenizer(file)
    flavour: Flavour = "original" if flags.flavour == "gmai-vl" else "transformers"
    dtype = _dtype(flags, checkpoint)
    count = sum(map(math.prod, export_shapes(config.model).values()))
    write_pretrained(
        flags.output,
        config.model,
        weights,
        tokenizer_model=file,
        special_tokens=tokenizer.special_tokens,
        reserved=tokenizer.reserved,
        chat_template=config.data.chat_template,
        dtype=dtype,
        leftovers=leftovers_of(checkpoint.path, config, flags.llava),
        pad_to_square=config.data.pad_to_square,
        flavour=flavour,
        advance=Progress(count * dtype.itemsize),
    )
    print(f"wrote {flags.output}")
    return 0


def to_peft(flags: argparse.Namespace) -> int:
    """Adapters of a checkpoint -> a folder in PEFT's format. Raises ValueError for the user's
    mistakes."""
    checkpoint = read_manifest(Path(flags.load))
    config = checkpoint.config
    if not config.lora.towers:
        raise ValueError(f"{checkpoint.path} holds no adapters; a whole model goes out by to-hf")
    own = CheckpointWeights(checkpoint.path, config.model, config.lora)
    changed = changed_towers(own, open_base(config, flags.base))
    base = str(flags.base or config.run.llava or "")
    usable = not changed and base and open_side(Path(base)).kind == "transformers"
    write_peft(
        Path(flags.output),
        config.model,
        config.lora,
        own,
        base if usable else None,
        changed,
        _dtype(flags, checkpoint),
    )
    if changed:
        print(f"the run also trained {in_words(changed)}: see README.md in the folder")
    print(f"wrote {flags.output}")
    return 0


def _dtype(flags: argparse.Namespace, checkpoint: Manifest) -> torch.dtype:
    if flags.dtype:
        return DTYPES[flags.dtype]
    config = checkpoint.config
    return CheckpointWeights(checkpoint.path, config.model, config.lora).dtype


def leftovers_of(checkpoint: Path, config: Config, given: str | None) -> dict[str, torch.Tensor]:
    """CLIP's last layer and final norm: from the folder that was given, from the checkpoint, or
    from the folder that the run began with. Says so where there are none."""
    if given is None and (carried := read_carried(checkpoint, config.model)):
        return carried
    folder = given or config.run.llava
    if folder is None or (given is None and not Path(folder).is_dir()):
        moved = f" and {folder}, which training began with, is gone" if folder else ""
        print(
            f"convert_checkpoint: {checkpoint} carries no last CLIP layer{moved}; an identity is "
            "written in its place, which changes nothing for this model (--llava FOLDER fills it)",
            file=sys.stderr,
        )
        return {}
    source = open_pretrained(folder)
    if source.model.vision != config.model.vision:
        raise ValueError(
            f"{folder} has another vision tower than {checkpoint}: {source.model.vision}, not "
            f"{config.model.vision}. Give --llava the folder that training began with"
        )
    if not source.leftovers:
        raise ValueError(f"{folder} lacks CLIP's last layer or final norm; give another --llava")
    return dict(source.leftovers)


def from_hf(flags: argparse.Namespace) -> int:
    """Hugging Face folder -> training checkpoint. Raises ValueError for the user's mistakes."""
    separate = (flags.llm, flags.vision)
    if any(separate) == bool(flags.model) or any(separate) != all(separate):
        raise ValueError("give --model DIR, or both --llm DIR and --vision DIR")
    for folder in filter(None, (flags.model, flags.llm, flags.vision)):
        existing_folder(folder)  # or the tokenizer is what would be missed in it
    file = tokenizer_file(flags.tokenizer or flags.model or flags.llm)
    source = _open_source(flags, load_tokenizer(file))
    config = Config(model=source.model, data=DataConfig(tokenizer=str(file.absolute())))
    num_bytes = source.num_bytes
    if flags.dtype:
        count = parameters(source.model)
        num_bytes = count * DTYPES[flags.dtype].itemsize
    write_training_checkpoint(
        Path(flags.output),
        config,
        source.weights,
        source.leftovers,
        dtype=DTYPES[flags.dtype] if flags.dtype else None,
        needed_bytes=num_bytes,
        advance=Progress(num_bytes),
    )
    print(f"wrote {flags.output}")
    return 0


def _open_source(flags: argparse.Namespace, tokenizer: Tokenizer) -> Pretrained:
    if flags.model:
        source = open_pretrained(flags.model)
        check_tokenizer(source.model, tokenizer.vocab_size, tokenizer.image_token_id)
        return source
    return open_separate(
        flags.llm, flags.vision, tokenizer.vocab_size, tokenizer.image_token_id, flags.seed
    )


def verify(flags: argparse.Namespace) -> int:
    """Compares two checkpoints and writes card.json. Raises ValueError for other models."""
    from megatron_gmai.verification.ranks import training_world

    a, b = open_side(flags.a, flags.base), open_side(flags.b, flags.base)
    file = flags.card or (b.path / "card.json" if b.kind != _TRAINING else None)
    if file is not None:
        _check_card(file)
    parallel = ParallelConfig(
        tensor_model_parallel_size=flags.tensor_model_parallel_size,
        pipeline_model_parallel_size=flags.pipeline_model_parallel_size,
    )
    if parallel == ParallelConfig() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _verify(a, b, flags.tolerance, file, None)
    with training_world(a.model, parallel) as ranks:
        return _verify(ranks.hold(a), b, flags.tolerance, file, ranks)


def _verify(a: Side, b: Side, tolerance: float, file: Path | None, ranks: "Ranks | None") -> int:
    from megatron_gmai.verification.run import ran_in_words, run_both

    is_told = ranks is None or ranks.world.is_first_rank  # all ranks compare, one says so
    tell: Callable[[str], None] = print if is_told else (lambda line: None)
    size = parameters(a.model) * a.weights[_FINAL_NORM].dtype.itemsize
    groups = compare(a, b, Progress(size) if is_told else not_counted)
    tell(table(groups))
    if missing := only_in_one(a, b):
        tell(missing)
    same = all(group.largest_difference <= tolerance for group in groups)
    exact = all(group.largest_difference == 0 for group in groups)
    rounded = any(len(set(group.dtypes)) > 1 for group in groups)
    ran = run_both(a, b, exact and not rounded, ranks)
    tell(ran if isinstance(ran, str) else ran_in_words(ran))
    same &= isinstance(ran, str) or ran["same"]
    if file is not None and is_told:
        content = card(sys.argv, (a, b), tolerance, groups, ran)
        write_atomically(file, (json.dumps(content, indent=1) + "\n").encode())
        tell(f"wrote {file}")
    tell("the same" if same else "they differ")
    return 0 if same else 1


def _check_card(file: Path) -> None:
    """Raises ValueError, before hours of comparing, if the card could not be written."""
    if (file.exists() and not file.is_file()) or not os.access(file.parent, os.W_OK):
        raise ValueError(f"{file} cannot be written; name another file with --card FILE")


def open_side(path: Path, base: Path | None = None) -> Side:
    """A Hugging Face folder of either flavour, or a training checkpoint, adapters merged."""
    if is_hugging_face(path):
        source = open_pretrained(path)
        kind = "transformers" if source.flavour == "transformers" else "gmai-vl"
        return Side(path, kind, source.model, source.weights, source.leftovers)
    checkpoint = read_manifest(path)
    model = checkpoint.config.model
    carried = read_carried(checkpoint.path, model)
    weights = open_trained(checkpoint, base)
    return Side(checkpoint.path, _TRAINING, model, weights, carried)


if __name__ == "__main__":
    run_guarded(lambda: sys.exit(main()))
