"""Line charts as inline SVG: small enough for a phone, coloured by the page's style."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 180  # about a phone's width, so that text keeps its size there
LEFT, RIGHT, TOP, BOTTOM = 46, 6, 16, 20
COLUMNS = 240  # places in the width: steps that share one are drawn as mean and range
LOG_FROM = 30.0  # highest over lowest value from which a logarithmic axis is easier to read
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    points: Points  # (step, value)
    style: str = "line"  # class in the page's style sheet


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step."""

    step: float
    style: str  # `restart` or `phase`
    title: str
    label: str = ""  # written beside the line


@dataclass(frozen=True)
class Scale:
    """Values to places; logarithmic where the range is wide."""

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[float], may_be_log: bool) -> "Scale":
        low, high = min(values), max(values)
        if may_be_log and low > 0 and high / low > LOG_FROM:
            return cls(low, high, True)
        margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        return cls(low - margin if low < 0 or low > margin else 0.0, high + margin, False)

    def fraction(self, value: float) -> float:
        """0 at `low` to 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values, about four."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if len(powers) <= 3 else (1,)
            found = [factor * 10.0**power for power in powers for factor in factors]
        else:
            rough = (self.high - self.low) / 4
            power = 10.0 ** math.floor(math.log10(rough))
            step = min((f * power for f in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
            first = math.ceil(self.low / step)
            found = [n * step for n in range(first, math.floor(self.high / step) + 1)]
        return [value for value in found if self.low <= value <= self.high]


def chart(
    title: str, lines: Sequence[Line], marks: Sequence[Mark] = (), may_be_log: bool = True
) -> str:
    """A figure with the newest value of the last line that is not `lost`; values that are not
    finite leave gaps. Empty text if there is nothing to draw."""
    lines = [Line([p for p in line.points if math.isfinite(p[1])], line.style) for line in lines]
    values = [value for line in lines for _, value in line.points]
    if not values:
        return ""
    steps = [step for line in lines for step, _ in line.points]
    first, last = min(steps), max(steps)
    scale = Scale.of(values, may_be_log)

    def x(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (1 - scale.fraction(value)) * (HEIGHT - TOP - BOTTOM)

    parts = [_grid(scale, y), *(_mark(mark, x(mark.step)) for mark in marks)]
    parts += [_steps(first, last)]
    for line in lines:
        parts.append(_drawn(line, [(x(step), y(value)) for step, value in line.points]))
    newest = [line.points[-1][1] for line in lines if line.points and line.style == "line"][-1:]
    caption = number(newest[0]) if newest else ""
    return (
        f"<figure><figcaption>{html.escape(title)} <b>{caption}</b></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _drawn(line: Line, corners: Sequence[tuple[float, float]]) -> str:
    """The mean of each column as a line, and its range behind it, so that no spike is lost."""
    columns: dict[int, list[tuple[float, float]]] = {}
    for fraction in corners:
        columns.setdefault(int((fraction[0] - LEFT) / (WIDTH - LEFT - RIGHT) * COLUMNS), []).append(
            fraction
        )
    means, ranges = [], []
    for column in columns.values():
        across = sum(x for x, _ in column) / len(column)
        heights = [y for _, y in column]
        means.append(f"{across:.1f},{sum(heights) / len(heights):.1f}")
        if len(heights) > 1:
            ranges.append(f"M{across:.1f} {min(heights):.1f}V{max(heights):.1f}")
    if len(means) == 1:
        x, y = corners[0]
        return f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>'
    behind = f'<path class="range" d="{"".join(ranges)}"/>' if ranges else ""
    return f'{behind}<polyline class="{line.style}" points="{" ".join(means)}"/>'


def _grid(scale: Scale, y: Callable[[float], float]) -> str:
    return "".join(
        f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 4}" y="{y(tick) + 3:.1f}" text-anchor="end">{number(tick)}</text>'
        for tick in scale.ticks()
    )


def _steps(first: float, last: float) -> str:
    bottom = HEIGHT - 5
    return (
        f'<text x="{LEFT}" y="{bottom}">step {first:.0f}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{bottom}" text-anchor="end">{last:.0f}</text>'
    )


def _mark(mark: Mark, x: float) -> str:
    return (
        f'<path class="{mark.style}" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}">'
        f"<title>{html.escape(mark.title)}</title></path>"
        f'<text x="{x + 3:.1f}" y="{TOP - 5}">{html.escape(mark.label)}</text>'
    )


def number(value: float) -> str:
    """Four digits or fewer, as `0.0123`, `12.3k`, `1.2e-05`."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.1e}"
