"""One measured number of the kernel benchmark, and the table that shows all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """A number with its unit and, where there is one, the bar it has to hold."""

    name: str
    value: float
    unit: str
    bar: str = ""
    holds: bool | None = None


def at_most(name: str, value: float, unit: str, bar: float) -> Figure:
    """A figure that holds if it does not exceed `bar`."""
    return Figure(name, value, unit, f"<= {bar:.4g}", value <= bar)


def at_least(name: str, value: float, unit: str, bar: float) -> Figure:
    """A figure that holds if it reaches `bar`."""
    return Figure(name, value, unit, f">= {bar:.4g}", value >= bar)


def show(figures: Iterable[Figure]) -> None:
    """Print one line a figure."""
    for figure in figures:
        verdict = {True: "holds", False: "MISSED", None: ""}[figure.holds]
        value = f"{figure.value:.4g} {figure.unit}"
        print(f"{figure.name:62} {value:>20} {figure.bar:>10}  {verdict}", flush=True)


def write(path: Path, figures: Iterable[Figure], notes: list[str], **more: object) -> None:
    """Write {"figures": [...], "notes": [...]} and what else there is as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"figures": [asdict(figure) for figure in figures], "notes": notes, **more}
    path.write_text(json.dumps(content, indent=1) + "\n")
