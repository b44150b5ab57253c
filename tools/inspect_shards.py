"""Shows what a folder of shards holds: counts on the terminal, samples on an HTML page.

    python tools/inspect_shards.py DIR [--html PAGE.html] [--samples 24]

The page has a picture of each image, the conversation as the model sees it with the supervised
tokens coloured, the tokens' lengths, and the samples that were rejected with their reasons, as far
as --datasets LIST.json says where they are. DIR may be a URL or a folder that cannot be written to.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_gmai.config import DataConfig, VisionConfig
from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.inspection.page import render_page
from megatron_gmai.data.inspection.rejected import group
from megatron_gmai.data.ledger import Rejection, read_ledger, visible
from megatron_gmai.data.plan.order import permutation
from megatron_gmai.data.prepare import prepare_data
from megatron_gmai.data.shards.index import REJECTED_FILE
from megatron_gmai.data.shards.lengths import token_lengths
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.text.encoder import make_encoder
from megatron_gmai.data.text.tokenizer import load_tokenizer

PAGE_FILE = "inspect.html"
MOST_REASONS = 10  # on the terminal


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after a mistake that the message explains."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="folder of shards, or its URL")
    parser.add_argument("--html", help="page to write (default: DIR/inspect.html, or one here)")
    parser.add_argument("--samples", type=int, default=24, help="samples on the page of each kind")
    parser.add_argument(
        "--datasets", help="list file of the shards: shows text and images of what it has rejected"
    )
    parser.add_argument("--tokenizer", help="default: the one in the folder")
    parser.add_argument("--chat-template", default="internlm2")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--image-size", type=int, default=336)
    flags = parser.parse_args(argv)
    if flags.samples < 0 or min(flags.max_length, flags.image_size) < 1:
        parser.error("--samples is 0 or more, --max-length and --image-size are 1 or more")
    data = DataConfig(
        shards=flags.folder,
        tokenizer=flags.tokenizer,
        chat_template=flags.chat_template,
        max_length=flags.max_length,
    )
    try:
        # Token lengths are kept beside the shards; where they cannot be, they are not kept.
        with tempfile.TemporaryDirectory() as cache:
            page = _inspect(data, VisionConfig(image_size=flags.image_size), cache, flags)
    except (ValueError, OSError) as error:
        print(f"inspect_shards: {visible(str(error))}", file=sys.stderr)
        return 2
    print(f"page: {page}")
    return 0


def _inspect(data: DataConfig, vision: VisionConfig, cache: str, flags: argparse.Namespace) -> Path:
    """Prints the report, writes the page and returns its name."""
    data = prepare_data(data, vision, cache, log=lambda line: print(line, file=sys.stderr))
    shards = Shards(str(data.shards))
    encoder = make_encoder(data, load_tokenizer(str(data.tokenizer)), vision)
    rows, too_long = token_lengths(shards, encoder)
    lengths = rows["length"].astype(np.int64)
    rejections = [*read_ledger(shards.folder / REJECTED_FILE), *too_long]
    table = source_table(shards, lengths)
    print(report(table, rejections))
    chosen = np.sort(permutation(len(shards), 0)[: flags.samples])
    page = Path(flags.html) if flags.html else _page_place(flags.folder)
    text = render_page(
        shards,
        encoder,
        flags.folder,
        table,
        lengths,
        rejections,
        chosen,
        flags.samples,
        flags.datasets,
    )
    write_atomically(page, text.encode())  # never through a link that lies in the folder
    return page


def _page_place(folder: str) -> Path:
    """In the folder, or in this one, named after it, where that cannot be written to."""
    if os.access(folder, os.W_OK):
        return Path(folder) / PAGE_FILE
    return Path(f"{folder.rstrip('/').rpartition('/')[2]}-{PAGE_FILE}")


def report(table: Sequence[Sequence[str]], rejections: Sequence[Rejection]) -> str:
    """Counts, lengths and images by data set, and the most frequent reasons of rejection."""
    lines = [" | ".join(map(visible, row)) for row in table]
    reasons = group(rejections)
    lines += [f"{count} rejected: {visible(reason)}" for reason, count in reasons[:MOST_REASONS]]
    if len(reasons) > MOST_REASONS:
        left = sum(count for _, count in reasons[MOST_REASONS:])
        lines.append(f"and {len(reasons) - MOST_REASONS} more reasons, of {left} samples")
    return "\n".join(lines)


def source_table(shards: Shards, lengths: np.ndarray) -> list[list[str]]:
    """A head and a row for each data set."""
    rows, table = shards.rows, []
    for number, source in enumerate(shards.manifest.sources):
        own = rows["source"] == number
        used = lengths[own & (lengths > 0)]
        spread = f"{used.min()} / {np.median(used):.0f} / {used.max()}" if len(used) else "-"
        table.append(
            [
                source.name,
                f"{source.samples}",
                f"{source.rejected}",
                f"{source.sample_ratio:g}",
                f"{rows['images'][own].sum()}",
                f"{(rows['images'][own] == 0).sum()}",
                spread,
            ]
        )
    head = ["data set", "samples", "rejected", "ratio", "images", "text only"]
    return [[*head, "tokens (least / median / most)"], *table]


if __name__ == "__main__":
    sys.exit(main())
