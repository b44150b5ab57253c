"""What was found, as one HTML file without scripts or outside references."""

import html
import math
from collections.abc import Sequence
from typing import Any

from megatron_gmai.gpu_check.finding import Finding

TITLES = {
    "parity": "The same steps as one process on a CPU",
    "memory": "A dry run's peak memory against the real one",
    "attention": "Attention over packs, forward and backward",
    "kernels": "Fused kernels against their rivals",
    "quick start": "Quick start, phases 1 and 2",
    "speed": "Training of the largest model that fits",
}
_STYLE = """
:root { color-scheme: light dark; --text: #1d2329; --soft: #5d6873; --line: #d9dee3;
  --back: #fff; --good: #1a7f4b; --bad: #c2402a }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --soft: #9aa5b0; --line: #36404a;
  --back: #14181c; --good: #5cc98e; --bad: #ff8a6b } }
body { margin: 0 auto; padding: 1.5rem; max-width: 60rem; background: var(--back);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem }
p, small { color: var(--soft); margin: .3rem 0 } table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top } th { color: var(--soft); font-weight: 500; font-size: .9rem }
.found { table-layout: fixed } .found th:first-child { width: 52% }
.found :is(td, th):nth-child(2) { text-align: right; font-variant-numeric: tabular-nums }
.good { color: var(--good) } .bad { color: var(--bad); font-weight: 600 }
"""


def render_page(findings: Sequence[Finding], about: dict[str, Any], seconds: float) -> str:
    """The page; `about` describes the machine."""
    names = dict.fromkeys(finding.check for finding in findings)
    parts = [_section(name, [f for f in findings if f.check == name]) for name in names]
    rows = "".join(f"<tr><td>{_text(k)}<td>{_text(v)}" for k, v in about.items())
    return "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8>",
            '<meta name=viewport content="width=device-width, initial-scale=1">',
            f"<title>GPU check</title><style>{_STYLE}</style>",
            f"<h1>GPU check: {_text(verdict(findings))}</h1>",
            f"<p>{_text(about.get('gpus', 'no GPU'))}, {seconds:.0f} s</p>",
            *parts,
            f"<h2>Machine</h2><table>{rows}</table></html>",
        ]
    )


def verdict(findings: Sequence[Finding]) -> str:
    """How many of the bars hold."""
    judged = [finding for finding in findings if finding.holds is not None]
    missed = sum(not finding.holds for finding in judged)
    return f"{missed} of {len(judged)} bars missed" if missed else f"all {len(judged)} bars hold"


def _section(name: str, findings: list[Finding]) -> str:
    rows = "".join(_row(finding) for finding in findings)
    head = "<tr><th>what<th>measured<th>bar<th>"
    return f"<h2>{_text(TITLES.get(name, name))}</h2><table class=found>{head}{rows}</table>"


def _row(finding: Finding) -> str:
    words = {True: ("good", "holds"), False: ("bad", "missed"), None: ("", "")}
    kind, word = words[finding.holds]
    note = f"<br><small>{_text(finding.note)}</small>" if finding.note else ""
    return (
        f"<tr><td>{_text(finding.name)}{note}<td>{_text(shown(finding))}<td>{_text(finding.bar)}"
        f"<td class='{kind}'>{word}"
    )


def shown(finding: Finding) -> str:
    """The value with its unit; a dash where there is none."""
    if math.isnan(finding.value):
        return "–"
    digits = f"{finding.value:,.0f}" if abs(finding.value) >= 1000 else f"{finding.value:.3g}"
    return f"{digits} {finding.unit}".strip()


def _text(value: Any) -> str:
    return html.escape(str(value))
