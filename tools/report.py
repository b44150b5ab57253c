"""Writes one HTML page about a run, or about all runs in a folder (the phases of a recipe).

    python tools/report.py WORK_DIR [--output PAGE.html]

Loss, gradient norm, speed, pack fill and memory over every restart, rejected samples by reason with
pictures, settings and environment. The page is one file without scripts or outside references.
"""

import argparse
import sys
from pathlib import Path

from megatron_gmai.report.page import render_page
from megatron_gmai.report.read import read_runs


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after a mistake that the message explains."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("work_dir", type=Path, help="of one run, or the folder of several")
    parser.add_argument("--output", type=Path, help="default: WORK_DIR/report.html")
    flags = parser.parse_args(argv)
    page = flags.output or flags.work_dir / "report.html"
    try:
        runs = read_runs(flags.work_dir)
        page.write_text(render_page(runs, flags.work_dir.resolve().name), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
