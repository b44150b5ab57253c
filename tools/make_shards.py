"""Makes WebDataset shards from GMAI-VL's list of data sets.

    python tools/make_shards.py --datasets LIST.json --output DIR [--tokenizer FILE]
    python tools/make_shards.py --index DIR     shards that other tools have made

Every annotation is checked and every image decoded once. What cannot be used is counted and stands
in DIR/rejected.jsonl with its key, data set and reason. A run that was interrupted is continued by
the same command.
"""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megatron_gmai.data.ledger import visible
from megatron_gmai.data.pool import available_cores
from megatron_gmai.data.prepare import copy_tokenizer
from megatron_gmai.data.shards.build import build_shards
from megatron_gmai.data.shards.foreign import index_shards
from megatron_gmai.data.shards.index import REJECTED_FILE, Manifest
from megatron_gmai.data.text.tokenizer import load_tokenizer


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after a mistake that the message explains."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--datasets", help="GMAI-VL list file (JSON)")
    parser.add_argument("--output", help="folder for the shards")
    parser.add_argument("--index", help="instead: folder of WebDataset shards to write an index of")
    parser.add_argument("--tokenizer", help="sentencepiece model to keep with the shards")
    parser.add_argument(
        "--workers", type=int, default=available_cores(), help="processes; 0: only this one"
    )
    parser.add_argument(
        "--tiff-pages",
        choices=("first", "all"),
        default="first",
        help="of a TIFF of several pages: the first is its image (default), or all are images, and "
        "the tag of the file stands for each of them",
    )
    parser.add_argument(
        "--image-root",
        help="folder into which absolute image names and links may lead (default: none)",
    )
    flags = parser.parse_args(argv)
    if bool(flags.index) == bool(flags.datasets) or bool(flags.datasets) != bool(flags.output):
        parser.error("give --datasets with --output, or --index alone")
    if flags.index and (flags.tiff_pages != "first" or flags.image_root):
        parser.error("--index takes files as they are: no --tiff-pages all, no --image-root")
    if flags.workers < 0:
        parser.error(f"--workers {flags.workers}: give 0 or more")
    folder = Path(flags.index or flags.output)
    try:
        manifest = _make(flags, folder)
    except (ValueError, OSError) as error:
        print(f"make_shards: {_shown(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("make_shards: interrupted; the same command goes on from here", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    print(report(manifest, folder))
    if not manifest.samples:
        print("make_shards: no sample can be used", file=sys.stderr)
    return 0 if manifest.samples else 2


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A scheduler's SIGTERM ends the work as Ctrl-C does."""
    raise KeyboardInterrupt(number)


def _shown(lines: str) -> str:
    """Names of strangers' files may steer a terminal."""
    return "\n".join(map(visible, lines.split("\n")))


def _make(flags: argparse.Namespace, folder: Path) -> Manifest:

    def log(line: str) -> None:
        print(_shown(line), file=sys.stderr, flush=True)

    if flags.tokenizer:
        load_tokenizer(flags.tokenizer)  # a mistake shows before anything is built
    if flags.index:
        manifest = index_shards(folder, flags.workers, log)
    else:
        manifest = build_shards(
            flags.datasets, folder, flags.workers, flags.tiff_pages, flags.image_root, log=log
        )
    if flags.tokenizer:
        copy_tokenizer(flags.tokenizer, folder)
    return manifest


def report(manifest: Manifest, folder: Path) -> str:
    """Counts by data set, and where the rejected ones are told."""
    names = [visible(source.name) for source in manifest.sources]
    width = max(len("all"), *map(len, names))
    lines = [f"{'data set':{max(width, 8)}}  samples  rejected  ratio"]
    for name, source in zip(names, manifest.sources, strict=True):
        lines.append(
            f"{name:{max(width, 8)}}  {source.samples:7}  {source.rejected:8}  "
            f"{source.sample_ratio:5g}"
        )
    lines.append(f"{'all':{max(width, 8)}}  {manifest.samples:7}  {manifest.rejected:8}")
    size = sum(shard.size for shard in manifest.shards)
    lines.append(f"{len(manifest.shards)} shard(s), {size / 1e6:.1f} MB, in {folder}")
    if manifest.rejected:
        lines.append(f"reasons: {folder / REJECTED_FILE}")
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
