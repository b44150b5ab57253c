"""Where the time of a step went on each pipeline stage, and what the planner had expected."""

import html
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from typing import Any

from megatron_gmai.config import Config
from megatron_gmai.layout import Layout
from megatron_gmai.planner.cost import load_of
from megatron_gmai.planner.hardware import gpu_of_driver
from megatron_gmai.planner.speed import step_time
from megatron_gmai.report.read import RunRecord

NEWEST = 200  # rows that are looked at
PARTS = {
    "compute": "forward and backward passes",
    "pipeline": "waiting for other stages: transfers and bubble",
    "reduce": "gradient reduction",
    "data": "waiting for micro-batches",
    "rest": "optimizer and all else",
}


def stage_times(run: RunRecord) -> str:
    """A bar for each pipeline stage, whose parts are the median seconds of a step, and the ranks
    that held the others up; empty text where no step tells."""
    rows = [row for row in run.rows[-NEWEST:] if row.get("stages")]
    if not rows:
        return ""
    whole = statistics.median(row["step_time_s"] for row in rows)
    bars = []
    for stage in range(len(rows[-1]["stages"])):
        parts_of_stage = [row["stages"][stage] for row in rows if stage < len(row["stages"])]
        parts = {
            name: statistics.median(one[name] for one in parts_of_stage)
            for name in PARTS
            if name != "rest"
        }
        parts["rest"] = max(0.0, whole - sum(parts.values()))
        bars.append(f"<p>stage {stage}</p><div class=bar>{''.join(_parts(parts))}</div>")
    legend = "".join(f"<span class={name}></span> {text} " for name, text in PARTS.items())
    return (
        f"<h2>A step of {html.escape(run.name)}, {whole:.3g} s</h2>{''.join(bars)}"
        f"<p class=legend>{legend}(medians of {len(rows)} steps)</p>{_stragglers(rows)}"
    )


def _parts(parts: dict[str, float]) -> Iterator[str]:
    whole = sum(parts.values()) or 1.0
    for name, seconds in parts.items():
        share = 100 * seconds / whole
        yield (
            f'<span class={name} style="width:{share:.2f}%" '
            f'title="{PARTS[name]}: {seconds:.3g} s, {share:.1f} %"></span>'
        )


def _stragglers(rows: list[dict[str, Any]]) -> str:
    counts = Counter(rank for row in rows for rank in row["stragglers"])
    ranks = ", ".join(f"rank {rank} in {n} of {len(rows)}" for rank, n in counts.most_common(5))
    return f"<p>Stragglers (steps): {ranks or 'none'}.</p>"


def planned_mfu(run: RunRecord) -> float | None:
    """MFU that the planner expects of this run; None on devices that it does not know."""
    start = run.starts[-1] if run.starts else {}
    found = re.match(r"\d+ x (.*)", str(start.get("gpus", "")))
    gpu = gpu_of_driver(found[1]) if found else None
    if gpu is None or not run.rows:
        return None
    config = Config.from_json(json.dumps(run.config))
    images = statistics.median(row["images"] for row in run.rows) / config.train.global_batch_size
    layout = Layout.of(config.parallel, int(start["processes"]))
    return step_time(config, layout, load_of(config, images), gpu).mfu(gpu)
