"""The page: one HTML file without scripts or outside references."""

import html
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.report.charts import Line, Mark, chart, number
from megatron_gmai.report.read import RunRecord
from megatron_gmai.report.rejected import by_reason, pictures
from megatron_gmai.report.times import planned_mfu, stage_times

# (title, key in metrics.jsonl, divided by, logarithmic where its range is wide)
SERIES = (
    ("loss", "loss", 1, True),
    ("gradient norm", "grad_norm", 1, True),
    ("tokens per second", "tokens_per_s", 1, True),
    ("seconds per step", "step_time_s", 1, True),
    ("pack fill, %", "pack_fill", 0.01, False),
    ("learning rate", "lr", 1, False),
    ("MFU, % (dashed: the plan's)", "mfu", 0.01, False),
    ("images per step", "images", 1, False),
    ("supervised tokens per step", "supervised_tokens", 1, False),
    ("peak memory of a rank, GiB", "peak_memory_bytes", 2**30, False),
)

NAMED = 3  # samples of a step that stands out


def render_page(runs: Sequence[RunRecord], title: str, sections: Sequence[str] = ()) -> str:
    """All runs on one axis of steps, one after the other; `sections` of HTML stand below."""
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8>",
            '<meta name=viewport content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title><style>{style}</style>",
            f"<h1>{_text(title)}</h1><p>{_newest(runs)}</p>",
            _tiles(runs),
            "<h2>Training</h2>",
            f"<div class=charts>{''.join(_charts(runs))}</div>",
            "<p>A line is the mean of the steps that share its place, the band behind it their "
            "range. Red: a restart, and dashed the steps that it took back.</p>",
            *sections,
            *map(stage_times, runs),
            *(_validation(run) for run in runs if run.valid),
            *(_alarms(run) for run in runs if run.skipped or run.spikes),
            "<h2>Starts</h2>",
            table(("run", "began (UTC)", "steps", "taken back", "lasted"), _attempt_rows(runs)),
            "<h2>Rejected samples</h2>",
            *(_rejected(run) for run in runs if run.rejections),
            "" if any(run.rejections for run in runs) else "<p>none</p>",
            "<h2>Settings</h2>",
            f"<details><summary>of {len(runs)} run(s)</summary>",
            _compared(runs, [_flat(run.config) for run in runs]),
            "</details><h2>Environment</h2>",
            "<details><summary>of the newest start of each run</summary>",
            _compared(runs, [run.starts[-1] if run.starts else {} for run in runs]),
            "</details>",
            "</html>",
        ]
    )


def _newest(runs: Sequence[RunRecord]) -> str:
    rows = [run.folder / "metrics.jsonl" for run in runs]
    written = max(path.stat().st_mtime for path in rows)
    return f"Newest step written {_moment(written)} UTC, page made {_moment(time.time())} UTC."


def _tiles(runs: Sequence[RunRecord]) -> str:
    last = runs[-1]
    rows = [row for run in runs for row in run.rows]
    planned = last.config.get("train", {}).get("train_iters")
    tiles = [
        ("run", last.name),
        ("step", f"{last.last_step}" + (f" of {planned}" if planned else "")),
        ("loss", number(last.rows[-1]["loss"])),
        ("tokens per second", number(statistics.median(row["tokens_per_s"] for row in last.rows))),
        ("pack fill", f"{100 * statistics.fmean(row['pack_fill'] for row in last.rows):.1f} %"),
        ("peak memory", f"{max(row['peak_memory_bytes'] for row in rows) / 2**30:.2f} GiB"),
        ("restarts", f"{sum(run.restarts for run in runs)}"),
        ("rejected samples", f"{len({r.key for run in runs for r in run.rejections})}"),
        ("skipped steps", f"{sum(len(run.skipped) for run in runs)}"),
    ]
    cells = (f"<div><span>{_text(name)}</span><b>{_text(value)}</b></div>" for name, value in tiles)
    return f"<div class=tiles>{''.join(cells)}</div>"


def _charts(runs: Sequence[RunRecord]) -> Iterator[str]:
    starts = _offsets(runs)
    marks = [Mark(start, "phase", f"{run.name} begins", run.name) for run, start in starts[1:]]
    marks += [
        Mark(start + attempt.first, "restart", f"{run.name} starts again at {attempt.first}")
        for run, start in starts
        for attempt in run.attempts[1:]
    ]
    for title, key, unit, may_be_log in SERIES:
        lines = [
            Line(
                [
                    (start + row["iteration"], row[key] / unit)
                    for row in run.rows
                    if row.get(key) is not None
                ]
            )
            for run, start in starts
        ]
        if key == "mfu":
            lines += [
                Line(
                    [(start + 1, expected / unit), (start + run.last_step, expected / unit)], "plan"
                )
                for run, start in starts
                if (expected := planned_mfu(run)) is not None
            ]
        if key == "loss":
            lines += [
                Line([(start + step, loss) for step, loss in lost.items()], "lost")
                for run, start in starts
                for lost in map(dict, _lost(run))
            ]
        yield chart(title, lines, marks, may_be_log)


def _offsets(runs: Sequence[RunRecord]) -> list[tuple[RunRecord, int]]:
    """Each run with the steps of those before it."""
    placed, before = [], 0
    for run in runs:
        placed.append((run, before))
        before += run.last_step
    return placed


def _lost(run: RunRecord) -> list[dict[int, float]]:
    """Of each attempt, the steps that the next one has done again."""
    following = [attempt.first for attempt in run.attempts[1:]]
    return [
        {step: loss for step, loss in attempt.losses.items() if step >= first}
        for attempt, first in zip(run.attempts, following, strict=False)
    ]


def _attempt_rows(runs: Sequence[RunRecord]) -> Iterator[Sequence[str]]:
    for run in runs:
        lost = [*map(len, _lost(run)), 0]
        for attempt, taken_back in zip(run.attempts, lost, strict=False):
            yield (
                _text(run.name),
                _moment(attempt.began),
                f"{attempt.first} to {attempt.last}",
                str(taken_back or ""),
                _duration(attempt.ended - attempt.began),
            )


def _validation(run: RunRecord) -> str:
    """The losses of all data sets as lines, and as numbers beside each other."""
    by_set: dict[str, list[dict[str, Any]]] = {}
    for row in run.valid:
        by_set.setdefault(row["data_set"], []).append(row)
    lines = [Line([(r["iteration"], r["loss"]) for r in rows]) for rows in by_set.values()]
    rows = (
        (_text(name), str(found[-1]["samples"]), str(found[-1]["iteration"]),
         *(number(value) for value in (found[0]["loss"], min(r["loss"] for r in found),
                                       found[-1]["loss"])))
        for name, found in by_set.items()
    )  # fmt: skip
    head = ("data set", "samples", "at step", "first", "least", "newest")
    drawn = chart("loss on held-out packs, a line a data set", lines)
    return (
        f"<h2>Validation of {_text(run.name)}</h2><div class=charts>{drawn}</div>"
        f"{table(head, rows)}"
    )


def _alarms(run: RunRecord) -> str:
    """Steps that were skipped, and steps whose loss stood out, with their first samples."""
    rows = [
        (row["iteration"], what(row), ", ".join(row["keys"][:NAMED]), len(row["keys"]))
        for rows, what in (
            (run.skipped, lambda row: f"skipped: {row['reason']}"),
            (run.spikes, lambda row: f"spike: {row['loss']:.4g}, median {row['median']:.4g}"),
        )
        for row in rows
    ]
    cells = (tuple(map(_text, row)) for row in sorted(rows))
    return f"<h2>Steps that stand out in {_text(run.name)}</h2>" + table(
        ("step", "why", "first samples", "samples"), cells
    )


def _rejected(run: RunRecord) -> str:
    shards = _shards(run)
    rows = []
    for reason in by_reason(run.rejections):
        sources = ", ".join(f"{name} {count}" for name, count in reason.sources.items())
        images = "" if shards is None else "".join(
            f'<img src="{url}" alt="{_text(key)}" title="{_text(key)}">'
            for key, url in pictures(reason, shards)
        )  # fmt: skip
        rows.append((str(len(reason.rejections)), _text(reason.text), _text(sources), images))
    return f"<h3>{_text(run.name)}</h3>" + table(
        ("samples", "reason", "data sets", "pictures"), rows
    )


def _shards(run: RunRecord) -> Shards | None:
    """The run's shards, where they can be read from here."""
    folder = run.config.get("data", {}).get("shards")
    try:
        return Shards(folder) if folder else None
    except (ValueError, OSError):
        return None


def _compared(runs: Sequence[RunRecord], values: Sequence[dict[str, Any]]) -> str:
    """One row a name, one column a run; what is the same for all is written once."""
    names = [name for name in dict.fromkeys(name for of in values for name in of) if name != "time"]
    rows = []
    for name in names:
        cells = [_text(of.get(name, "")) for of in values]
        same = len(set(cells)) == 1
        rows.append((_text(name), *([cells[0], *[""] * (len(cells) - 1)] if same else cells)))
    return table(("", *(_text(run.name) for run in runs)), rows)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def table(head: Sequence[str], rows: Any) -> str:
    """A table of cells that are HTML already."""
    lines = ["".join(f"<th>{cell}" for cell in head)]
    lines += ["".join(f"<td>{cell}" for cell in row) for row in rows]
    return f"<div class=wide><table><tr>{'<tr>'.join(lines)}</table></div>"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _text(value: object) -> str:
    return html.escape(str(value))
