"""One HTML page of cases: the image, the question, the answer, and what each protocol makes of it.

The page holds its pictures and needs nothing from elsewhere. Cases on which protocols disagree come
first: they show what a score depends on.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence

from PIL import Image

from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.evaluate.benchmarks.table import Benchmark, Item
from megatron_gmai.evaluate.scores import Scored

CASES = 24  # of each class
_PICTURE = 320
_CLASSES = ("disputed", "wrong", "unanswered", "right")
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5f6b76; --line: #d5dbe1; --card: #fff;
  --page: #f3f5f7; --good: #1a7f4b; --bad: #b3261e; --none: #8a5a00 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaee; --soft: #9aa7b3; --line: #333c45;
  --card: #1b2127; --page: #12161a; --good: #5ecb92; --bad: #ff8a80; --none: #f0b95a } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: pre }
td, th { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line) }
td:first-child, th:first-child { text-align: left }
nav { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0; position: sticky; top: 0;
  background: var(--page); padding: .5rem 0 }
nav label { padding: .45rem .8rem; border: 1px solid var(--line); border-radius: 1.2rem;
  background: var(--card); cursor: pointer }
nav input { accent-color: var(--ink) }
.cases { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)) }
article { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem; overflow-wrap: anywhere; min-width: 0 }
article img { max-width: 100%; max-height: 16rem; border-radius: .3rem; display: block;
  margin: 0 auto .4rem }
article ol { list-style: none; padding: 0; margin: .4rem 0 }
.said { border-left: 3px solid var(--line); padding-left: .6rem; white-space: pre-wrap }
.chips { display: flex; flex-wrap: wrap; gap: .3rem; font-size: .85rem }
.chips span { border: 1px solid currentColor; border-radius: .8rem; padding: 0 .5rem }
.good { color: var(--good) } .bad { color: var(--bad) } .none { color: var(--none) }
small { color: var(--soft) }
body:has(#show-disputed:not(:checked)) .disputed, body:has(#show-wrong:not(:checked)) .wrong,
body:has(#show-unanswered:not(:checked)) .unanswered,
body:has(#show-right:not(:checked)) article.right { display: none }
"""


def render_page(
    benchmark: Benchmark,
    verdicts: Mapping[str, Sequence[Scored]],
    table: Sequence[Sequence[str]],
    notes: Sequence[str],
    title: str,
) -> str:
    """The page. `table` is head and rows of the scores, `notes` stand below it; `verdicts` are by
    protocol."""
    cases = _by_question(verdicts)
    chosen = choose_cases(cases)
    counts = {name: sum(_class(case) == name for case in cases.values()) for name in _CLASSES}
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title><style>{STYLE}</style><h1>{_text(title)}</h1>",
        f"<div class=scroll>{_table(table)}</div>",
        *(f"<p>{_text(note)}</p>" for note in notes),
        "<nav aria-label='cases shown'>",
        *(
            f"<label><input type=checkbox id=show-{name} checked> {name} ({counts[name]})</label>"
            for name in _CLASSES
        ),
        "</nav><main class=cases>",
        *(_article(benchmark, cases[index]) for index in chosen),
        "</main></html>",
    ]
    return "\n".join(parts)


Case = dict[str, Scored]  # protocol -> its verdict on the question


def _by_question(verdicts: Mapping[str, Sequence[Scored]]) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for protocol, scored in verdicts.items():
        for one in scored:
            cases.setdefault(one.item.index, {})[protocol] = one
    return cases


def _class(case: Case) -> str:
    verdicts = [one.verdict for one in case.values()]
    right = [verdict.score == 1 for verdict in verdicts]
    if any(right) and not all(right):
        return "disputed"
    if all(right):
        return "right"
    return "unanswered" if any(verdict.unanswered for verdict in verdicts) else "wrong"


def choose_cases(cases: Mapping[str, Case]) -> list[str]:
    """Up to CASES indices of each class, spread over the file."""
    chosen = []
    for name in _CLASSES:
        members = [index for index, case in cases.items() if _class(case) == name]
        count = min(CASES, len(members))
        chosen += [members[position * len(members) // count] for position in range(count)]
    return chosen


def _article(benchmark: Benchmark, case: Case) -> str:
    one = next(iter(case.values()))
    item = one.item
    chips = "".join(
        f"<span class={_colour(s)} title='{_text(s.verdict.parsed)}'>{_text(name)}"
        f" {s.verdict.score:.3g}{' ↯' if s.verdict.fallback else ''}</span>"
        for name, s in case.items()
    )
    return (
        f"<article class={_class(case)}>{_pictures(benchmark, item)}"
        f"<b>{_text(item.question)}</b>{_options(item)}"
        f"<p class=said>{_text(one.answer) or '<i>nothing</i>'}</p>"
        f"<p>Right: <b>{_text(item.answer)}</b></p><div class=chips>{chips}</div>"
        f"<small>index {_text(item.index)}</small></article>"
    )


def _colour(scored: Scored) -> str:
    if scored.verdict.unanswered:
        return "none"
    return "good" if scored.verdict.score == 1 else "bad"


def _options(item: Item) -> str:
    lines = "".join(f"<li>{c}. {_text(text)}</li>" for c, text in item.options.items())
    return f"<ol>{lines}</ol>" if lines else ""


def _pictures(benchmark: Benchmark, item: Item) -> str:
    try:
        return "".join(_picture(data) for data in benchmark.images(item))
    except BadSample as error:
        return f"<p class=bad>no picture: {_text(error)}</p>"


def _picture(data: bytes) -> str:
    image = Image.fromarray(decode(data))
    image.thumbnail((_PICTURE, _PICTURE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"<img loading=lazy alt='image of the question' src='data:image/jpeg;base64,{encoded}'>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows)
    lines = "".join(f"<tr>{row}</tr>" for row in body)
    return f"<table><tr>{head.replace('td>', 'th>')}</tr>{lines}</table>"


def _text(value: object) -> str:
    return html.escape(str(value))
