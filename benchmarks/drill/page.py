"""The report's page of a drill, with a table of its faults."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_gmai.report.page import render_page, table
from megatron_gmai.report.read import read_runs

HEAD = ("run", "fault", "step", "rank", "phase", "steps lost", "ended after, s", "back after, s")
KEYS = ("run", "kind", "step", "rank", "phase", "lost")


def write_page(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """`folder/report.html` of the runs in `folder`, and their faults."""
    section = f"<h2>Faults</h2>{table(HEAD, map(_cells, rows))}"
    page = folder / "report.html"
    page.write_text(render_page(read_runs(folder), "Drill", [section]), encoding="utf-8")
    return page


def _cells(row: dict[str, Any]) -> list[str]:
    """Faults that end no process took no time."""
    known = ["" if row[key] is None else str(row[key]) for key in KEYS]
    return known + [f"{row[key]:.1f}" if row[key] else "" for key in ("noticed", "seconds")]
