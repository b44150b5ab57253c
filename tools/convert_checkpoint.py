"""Converts between training checkpoints and Hugging Face folders.

    python tools/convert_checkpoint.py to-hf --load CHECKPOINT --output DIR [--llava DIR]
    python tools/convert_checkpoint.py from-hf --model DIR --output DIR [--tokenizer FILE]

`to-hf` writes the transformers flavour, which loads without remote code; it reads a checkpoint of
any layout, one tensor at a time. `from-hf` reads either flavour and writes weights to start from
with `--load`.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from megatron_gmai.config import Config, DataConfig
from megatron_gmai.convert.distributed import CheckpointWeights
from megatron_gmai.convert.huggingface import open_pretrained, write_pretrained
from megatron_gmai.data.text.tokenizer import MODEL_FILE, load_tokenizer
from megatron_gmai.runtime.quiet import quiet_libraries

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after a mistake that the message explains."""
    flags = _parser().parse_args(argv)
    quiet_libraries()
    try:
        to_hf(flags) if flags.direction == "to-hf" else from_hf(flags)
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    print(f"wrote {flags.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    directions = parser.add_subparsers(dest="direction", required=True)
    out = directions.add_parser("to-hf", help="training checkpoint -> Hugging Face folder")
    out.add_argument("--load", required=True, help="iter_NNNNNNN, or a folder of checkpoints")
    out.add_argument("--output", required=True, help="folder to write")
    out.add_argument("--tokenizer", help="sentencepiece model (default: the run's own)")
    out.add_argument(
        "--llava", help="Hugging Face folder that training began with: its unused CLIP parts"
    )
    out.add_argument("--dtype", choices=DTYPES, help="default: that of the checkpoint")
    back = directions.add_parser("from-hf", help="Hugging Face folder -> training checkpoint")
    back.add_argument("--model", required=True, help="original or transformers flavour")
    back.add_argument("--output", required=True, help="folder of checkpoints to write")
    back.add_argument("--tokenizer", help="sentencepiece model (default: the folder's own)")
    back.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32", help="default: fp32")
    return parser


def to_hf(flags: argparse.Namespace) -> None:
    """Training checkpoint -> Hugging Face folder. Raises ValueError for the user's mistakes."""
    from megatron_gmai.training.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(Path(flags.load))
    config = checkpoint.config
    weights = CheckpointWeights(checkpoint.path, config.model)
    file = tokenizer_file(flags.tokenizer or config.data.tokenizer)
    llava = flags.llava or config.run.llava
    write_pretrained(
        flags.output,
        config.model,
        weights,
        tokenizer_model=file,
        special_tokens=load_tokenizer(file).special_tokens,
        chat_template=config.data.chat_template,
        dtype=DTYPES[flags.dtype] if flags.dtype else weights["projector.linear_fc1.bias"].dtype,
        leftovers=open_pretrained(llava).leftovers if llava else None,
        pad_to_square=config.data.pad_to_square,
    )


def from_hf(flags: argparse.Namespace) -> None:
    """Hugging Face folder -> training checkpoint. Raises ValueError for the user's mistakes."""
    from megatron_gmai.model.gmai_vl import build_chunks
    from megatron_gmai.runtime.world import open_world
    from megatron_gmai.training.checkpoint import Position, save_checkpoint
    from megatron_gmai.training.weights import fill

    source = Path(flags.model)
    pretrained = open_pretrained(source)
    file = tokenizer_file(flags.tokenizer or str(source))
    config = Config(
        model=pretrained.model,
        data=DataConfig(tokenizer=str(file)),
    )
    run = dataclasses.replace(
        config.run, llava=str(source.absolute()), device="cpu", dtype=flags.dtype
    )
    config = dataclasses.replace(config, run=run)
    chunks = build_chunks(config, open_world(config))
    fill(chunks, pretrained.weights)
    save_checkpoint(Path(flags.output), Position(), chunks, None, config)


def tokenizer_file(path: str | None) -> Path:
    """The sentencepiece model that a flag or a checkpoint names. Raises ValueError without one."""
    if path is None:
        raise ValueError("the checkpoint names no tokenizer; give --tokenizer FILE")
    file = Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"no sentencepiece model at {file}; give --tokenizer FILE")
    return file


if __name__ == "__main__":
    sys.exit(main())
