"""An HTML page, without outside references, of what a folder of shards holds."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from megatron_gmai.config import IGNORE_INDEX
from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.inspection.rejected import Finder, group
from megatron_gmai.data.ledger import BadSample, Rejection, visible
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.text.encoder import Encoder
from megatron_gmai.data.text.template import Rendered

THUMBNAIL = 160
MOST_IMAGES = 8  # of one sample
MOST_TEXT = 2000  # characters of a rejected sample
BARS = 40
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222 }
body { margin: 0 auto; padding: 2em; max-width: 75em }
table { border-collapse: collapse } td, th { padding: .2em 1em .2em 0; text-align: left }
.sample { border-top: 1px solid #ccc; padding: 1em 0; display: flex; gap: 1em }
.sample > div { flex: 0 0 180px; overflow-wrap: anywhere }
svg { width: 600px; border-bottom: 1px solid #999 } .grid svg { width: 270px }
.grid { display: flex; flex-wrap: wrap; gap: 1em 2em } .grid p { margin: 0 }
.counts td + td, .counts th + th { text-align: right } h3 { margin: 1em 0 0; font-size: 1em }
.sample img { display: block; max-width: 160px; margin-bottom: .5em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; flex: 1; min-width: 0 }
pre { font: 13px/1.5 ui-monospace, monospace }
mark { background: #c8ecc8 } i { color: #999; font-style: normal } rect { fill: #4a7ab0 }
b.token { font-weight: normal; border: 1px solid #999; border-radius: 3px; padding: 0 2px }
.reason { color: #a22; margin: 0 0 .5em; font: 15px/1.5 system-ui, sans-serif }
"""


def render_page(
    shards: Shards,
    encoder: Encoder,
    title: str,
    table: Sequence[Sequence[str]],
    lengths: np.ndarray,
    rejections: Sequence[Rejection],
    chosen: Sequence[int] | np.ndarray,
    most_rejected: int,
    list_file: str | None = None,
) -> str:
    """The page: counts, lengths, rejected samples, `chosen` samples. Rejected samples of the data
    sets of `list_file` are shown as they are there."""
    sources = enumerate(shards.manifest.sources)
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{text(title)}</title>",
        f"<style>{STYLE}</style><h1>{text(title)}</h1>",
        html_table(table),
        f"<h2>Tokens of a sample</h2>{histogram(lengths[lengths > 0])}",
        "<div class=grid>",
        *(
            f"<div><h3>{text(source.name)}</h3>"
            f"{histogram(lengths[(shards.rows['source'] == number) & (lengths > 0)])}</div>"
            for number, source in sources
        ),
        "</div>",
        *_render_rejections(Finder(shards, list_file), rejections, most_rejected),
        "<h2>Samples</h2><p><mark>Green</mark> is what the model learns to say. "
        "<b class=token>Boxed</b> is one special token; the same letters without a box are text.",
        *(render_sample(shards, encoder, int(sample)) for sample in chosen),
        _and_more(len(shards) - len(chosen), "samples"),
    ]
    return "\n".join(parts)


def _render_rejections(finder: Finder, rejections: Sequence[Rejection], most: int) -> list[str]:
    if not rejections:
        return ["<h2>Rejected</h2><p>none</p>"]
    reasons = [["reason (of several alike, the first)", "samples"]]
    reasons += [[reason, str(count)] for reason, count in group(rejections)]
    return [
        f"<h2>Rejected</h2><p>{len(rejections)} samples</p>",
        html_table(reasons),
        *(render_rejected(line, finder) for line in rejections[:most]),
        _and_more(len(rejections) - most, "rejected samples, in the ledger"),
    ]


def _and_more(count: int, what: str) -> str:
    return f"<p>and {count} more {what}</p>" if count > 0 else ""


def render_rejected(line: Rejection, finder: Finder) -> str:
    """One rejected sample: where it stands and its images on the left, reason and text beside."""
    found = finder.look(line)
    origin = f"{line.file}, record {line.record}" if line.record else line.file
    names = [line.key, line.id and f"id {line.id}", origin, line.image and f"image {line.image}"]
    label = "<br>".join(text(name) for name in names if name)
    shown = found.text[:MOST_TEXT]
    rest = len(found.text) - len(shown)
    body = text(shown) + (f" <i>and {rest} more characters</i>" if rest else "")
    return (
        f"<div class=sample><div>{_thumbnails(found.images)}<small>{label}</small></div>"
        f"<pre><p class=reason>{text(line.reason)}</p>{body}</pre></div>"
    )


def render_sample(shards: Shards, encoder: Encoder, sample: int) -> str:
    """One sample: its images on the left, its tokens as text on the right."""
    try:
        stored = shards.read(sample)
        rendered = encoder.encode(stored.record, len(stored.images))
    except BadSample as error:
        return f"<div class=sample>{text(shards.location(sample))}: {text(error)}</div>"
    title = f"{text(stored.key)}<br>{len(rendered.tokens)} tokens"
    return (
        f"<div class=sample><div>{_thumbnails(stored.images)}<small>{title}</small></div>"
        f"<pre>{coloured(rendered, encoder)}</pre></div>"
    )


def coloured(rendered: Rendered, encoder: Encoder) -> str:
    """The tokens as text, supervised runs marked, special tokens boxed, an image's placeholders as
    one note."""
    starts = set(rendered.image_starts.tolist())
    supervised = rendered.labels != IGNORE_INDEX
    edges = {0, len(rendered.tokens), *(np.flatnonzero(np.diff(supervised)) + 1).tolist()}
    edges |= starts | {start + rendered.tokens_per_image for start in starts}
    bounds, parts = sorted(edges), []
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        if first in starts:
            parts.append(f"<i>[image: {last - first} tokens]</i>")
            continue
        run = _boxed(rendered.tokens[first:last].tolist(), encoder)
        parts.append(f"<mark>{run}</mark>" if supervised[first] else run)
    return "".join(parts)


def _boxed(tokens: Sequence[int], encoder: Encoder) -> str:
    """Text of a run of tokens. A text that spells a special token decodes to the same letters, so
    only the box tells them apart."""
    tokenizer = encoder.tokenizer
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    parts, start = [], 0
    for position, token in enumerate(tokens):
        if token in names:
            parts.append(text(tokenizer.decode(tokens[start:position])))
            parts.append(f"<b class=token title='token {token}'>{text(names[token])}</b>")
            start = position + 1
    return "".join([*parts, text(tokenizer.decode(tokens[start:]))])


def histogram(values: np.ndarray) -> str:
    """An inline drawing of the distribution."""
    if not len(values):
        return "<p>none</p>"
    counts, edges = np.histogram(values, BARS)
    bars = []
    for position, count in enumerate(counts):
        height = 100 * count / counts.max()
        bars.append(
            f"<rect x={position * 15} y={100 - height:.1f} width=14 height={height:.1f}>"
            f"<title>{edges[position]:.0f} to {edges[position + 1]:.0f}: {count}</title></rect>"
        )
    label = f"{edges[0]:.0f} to {edges[-1]:.0f} tokens, mean {values.mean():.0f}"
    return f"<svg viewBox='0 0 {BARS * 15} 100'>{''.join(bars)}</svg><p>{label}</p>"


def _thumbnails(images: Sequence[bytes | str]) -> str:
    shown = "".join(map(_thumbnail, images[:MOST_IMAGES]))
    return shown + _and_more(len(images) - MOST_IMAGES, "images")


def _thumbnail(image: bytes | str) -> str:
    if isinstance(image, str):
        return f"<p><i>{text(image)}</i></p>"
    try:
        picture = Image.fromarray(decode(image))
    except BadSample as error:
        return f"<p><i>no picture: {text(error)}</i></p>"
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = ("".join(f"<td>{text(cell)}" for cell in row) for row in rows)
    lines = "".join(f"<tr>{row}" for row in body)
    return f"<table class=counts><tr>{head.replace('<td>', '<th>')}{lines}</table>"


def text(value: object) -> str:
    """Escaped: samples come from strangers."""
    return html.escape("\n".join(map(visible, str(value).split("\n"))))
