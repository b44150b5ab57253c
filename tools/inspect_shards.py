"""Shows what a folder of shards holds: counts on the terminal, samples on an HTML page.

    python tools/inspect_shards.py DIR [--html PAGE.html] [--samples 24]

The page has a picture of each image, the conversation as the model sees it with the supervised
tokens coloured, the tokens' lengths, and the reasons why samples were rejected.
"""

import argparse
import base64
import html
import io
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_gmai.config import DataConfig, VisionConfig
from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.ledger import BadSample, Rejection, read_ledger
from megatron_gmai.data.plan.order import permutation
from megatron_gmai.data.prepare import resolve_tokenizer
from megatron_gmai.data.shards.index import REJECTED_FILE
from megatron_gmai.data.shards.lengths import token_lengths
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.text.encoder import Encoder, make_encoder
from megatron_gmai.data.text.template import IGNORE, Rendered
from megatron_gmai.data.text.tokenizer import load_tokenizer

THUMBNAIL = 160
BARS = 40
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222 }
body { margin: 0 auto; padding: 2em; max-width: 75em }
table { border-collapse: collapse } td, th { padding: .2em 1em .2em 0; text-align: left }
.sample { border-top: 1px solid #ccc; padding: 1em 0; display: flex; gap: 1em }
.sample > div { flex: 0 0 180px; overflow-wrap: anywhere }
svg { width: 600px; border-bottom: 1px solid #999 } .grid svg { width: 270px }
.grid { display: flex; flex-wrap: wrap; gap: 1em 2em } .grid p { margin: 0 }
td + td, th + th { text-align: right } h3 { margin: 1em 0 0; font-size: 1em }
.sample img { display: block; max-width: 160px; margin-bottom: .5em }
pre { white-space: pre-wrap; margin: 0; flex: 1; font: 13px/1.5 ui-monospace, monospace }
mark { background: #c8ecc8 } i { color: #999; font-style: normal } rect { fill: #4a7ab0 }
"""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after a mistake that the message explains."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="folder of shards")
    parser.add_argument("--html", help="page to write (default: DIR/inspect.html)")
    parser.add_argument("--samples", type=int, default=24, help="samples on the page")
    parser.add_argument("--tokenizer", help="default: the one in the folder")
    parser.add_argument("--chat-template", default="internlm2")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--image-size", type=int, default=336)
    flags = parser.parse_args(argv)
    data = DataConfig(
        shards=flags.folder,
        tokenizer=flags.tokenizer,
        chat_template=flags.chat_template,
        max_length=flags.max_length,
    )
    try:
        shards = Shards(flags.folder)
        vision = VisionConfig(image_size=flags.image_size)
        encoder = make_encoder(data, load_tokenizer(resolve_tokenizer(data)), vision)
        rows, too_long = token_lengths(shards, encoder)
        lengths = rows["length"].astype(np.int64)
        rejections = [*read_ledger(shards.folder / REJECTED_FILE), *too_long]
        print(report(shards, lengths, rejections))
        page = Path(flags.html or shards.folder / "inspect.html")
        chosen = np.sort(permutation(len(shards), 0)[: flags.samples])
        page.write_text(render_page(shards, encoder, lengths, rejections, chosen), "utf-8")
    except (ValueError, OSError) as error:
        print(f"inspect_shards: {error}", file=sys.stderr)
        return 2
    print(f"page: {page}")
    return 0


def report(shards: Shards, lengths: np.ndarray, rejections: Sequence[Rejection]) -> str:
    """Counts, lengths and images by data set, and the most frequent reasons of rejection."""
    lines = [" | ".join(row) for row in source_table(shards, lengths)]
    lines += [f"{count} rejected: {reason}" for reason, count in reasons(rejections)]
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


def reasons(rejections: Sequence[Rejection]) -> list[tuple[str, int]]:
    """Reasons without the names and numbers in them, the most frequent first."""
    counts: Counter[str] = Counter()
    for rejection in rejections:
        reason = rejection.reason
        if reason.startswith("image ") and ": " in reason:
            reason = "image: " + reason.partition(": ")[2]
        counts["".join("#" if c.isdigit() else c for c in reason)] += 1
    return counts.most_common(10)


def render_page(
    shards: Shards,
    encoder: Encoder,
    lengths: np.ndarray,
    rejections: Sequence[Rejection],
    chosen: Sequence[int] | np.ndarray,
) -> str:
    """The page as one file without outside references."""
    head, *rows = source_table(shards, lengths)
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{_text(shards.folder)}</title>",
        f"<style>{STYLE}</style><h1>{_text(shards.folder)}</h1>",
        _table([head, *rows]),
        f"<h2>Tokens of a sample</h2>{histogram(lengths[lengths > 0])}",
        "<div class=grid>",
        *(
            f"<div><h3>{_text(source.name)}</h3>"
            f"{histogram(lengths[(shards.rows['source'] == number) & (lengths > 0)])}</div>"
            for number, source in enumerate(shards.manifest.sources)
        ),
        "</div>",
        "<h2>Rejected</h2>",
        _table([["reason", "samples"], *([r, str(n)] for r, n in reasons(rejections))])
        if rejections
        else "<p>none</p>",
        "<h2>Samples</h2><p><mark>Green</mark> is what the model learns to say.</p>",
        *(render_sample(shards, encoder, int(sample)) for sample in chosen),
    ]
    return "\n".join(parts)


def render_sample(shards: Shards, encoder: Encoder, sample: int) -> str:
    """One sample: its images on the left, its tokens as text on the right."""
    try:
        stored = shards.read(sample)
        rendered = encoder.encode(stored.record, len(stored.images))
        pictures = "".join(map(_thumbnail, stored.images))
    except BadSample as error:
        return f"<div class=sample>{_text(shards.location(sample))}: {_text(error)}</div>"
    title = f"{_text(stored.key)}<br>{len(rendered.tokens)} tokens"
    return (
        f"<div class=sample><div>{pictures}<small>{title}</small></div>"
        f"<pre>{coloured(rendered, encoder)}</pre></div>"
    )


def coloured(rendered: Rendered, encoder: Encoder) -> str:
    """The tokens as text, supervised runs marked, an image's placeholders as one note."""
    tokenizer, parts = encoder.tokenizer, []
    starts = set(rendered.image_starts.tolist())
    supervised = rendered.labels != IGNORE
    edges = {0, len(rendered.tokens), *(np.flatnonzero(np.diff(supervised)) + 1).tolist()}
    edges |= starts | {start + rendered.tokens_per_image for start in starts}
    bounds = sorted(edges)
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        if first in starts:
            parts.append(f"<i>[image: {last - first} tokens]</i>")
            continue
        text = _text(tokenizer.decode(rendered.tokens[first:last].tolist()))
        parts.append(f"<mark>{text}</mark>" if supervised[first] else text)
    return "".join(parts)


def histogram(values: np.ndarray) -> str:
    """An inline drawing of the distribution."""
    if not len(values):
        return "<p>none</p>"
    counts, edges = np.histogram(values, BARS)
    bars = []
    for place, count in enumerate(counts):
        height = 100 * count / counts.max()
        bars.append(
            f"<rect x={place * 15} y={100 - height:.1f} width=14 height={height:.1f}>"
            f"<title>{edges[place]:.0f} to {edges[place + 1]:.0f}: {count}</title></rect>"
        )
    label = f"{edges[0]:.0f} to {edges[-1]:.0f} tokens, mean {values.mean():.0f}"
    return f"<svg viewBox='0 0 {BARS * 15} 100'>{''.join(bars)}</svg><p>{label}</p>"


def _thumbnail(data: bytes) -> str:
    image = Image.fromarray(decode(data))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("".join(f"<td>{_text(cell)}" for cell in row) for row in rows)
    return f"<table><tr>{head.replace('<td>', '<th>')}{''.join(f'<tr>{r}' for r in body)}</table>"


def _text(value: object) -> str:
    return html.escape(str(value))


if __name__ == "__main__":
    sys.exit(main())
