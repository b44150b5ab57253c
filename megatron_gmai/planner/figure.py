"""The pipeline of a step as a picture: one row a stage, one box a pass."""

from xml.sax.saxutils import escape

from megatron_gmai.planner.schedule import Interval, Timeline

WIDTH, ROW, MARGIN, TOP = 1200, 26, 70, 60
FORWARD = ("#4c78a8", "#7ba3cc", "#a9c6e3", "#d3e2f1")  # by the chunk on its stage
BACKWARD = ("#e07b39", "#eb9e6a", "#f3bf9c", "#f9dfcd")
NUMBERED = 14  # pixels that a box needs to carry its micro-batch


def timeline_svg(timeline: Timeline, title: str) -> str:
    """Forward passes blue, backward passes orange, later chunks of a stage paler."""
    height = TOP + ROW * timeline.stages + 40
    scale = (WIDTH - MARGIN - 20) / timeline.seconds
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{MARGIN}" y="20" font-size="13">{escape(title)}</text>',
        f'<text x="{MARGIN}" y="40">{timeline.seconds:.3f} s, {timeline.bubble:.1%} waiting</text>',
    ]
    for stage in range(timeline.stages):
        parts.append(f'<text x="8" y="{TOP + ROW * stage + 17}">stage {stage}</text>')
    parts += [_box(interval, timeline.stages, scale) for interval in timeline.intervals]
    parts.append(_legend(height - 14))
    return "\n".join([*parts, "</svg>\n"])


def _box(interval: Interval, stages: int, scale: float) -> str:
    work = interval.work
    shades = FORWARD if work.forward else BACKWARD
    fill = shades[min(work.chunk // stages, len(shades) - 1)]
    x, width = MARGIN + interval.begin * scale, (interval.end - interval.begin) * scale
    y = TOP + ROW * interval.stage
    box = (
        f'<rect x="{x:.2f}" y="{y}" width="{max(width, 0.3):.2f}" height="{ROW - 4}" '
        f'fill="{fill}" stroke="white" stroke-width="0.4"/>'
    )
    if width < NUMBERED:
        return box
    middle = x + width / 2
    return (
        box + f'<text x="{middle:.2f}" y="{y + 15}" text-anchor="middle">{work.micro_batch}</text>'
    )


def _legend(y: int) -> str:
    return (
        f'<rect x="{MARGIN}" y="{y - 9}" width="10" height="10" fill="{FORWARD[0]}"/>'
        f'<text x="{MARGIN + 14}" y="{y}">forward</text>'
        f'<rect x="{MARGIN + 80}" y="{y - 9}" width="10" height="10" fill="{BACKWARD[0]}"/>'
        f'<text x="{MARGIN + 94}" y="{y}">backward (numbers: micro-batches; white: waiting)</text>'
    )
