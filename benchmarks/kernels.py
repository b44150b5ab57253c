"""Benchmark of the fused kernels: CPU, compiler and traffic, and a GPU where there is one.

Prints a table and writes it to runs/bench/kernels.json: a list `figures` of {name, value, unit,
bar, holds}, and `notes`. Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import kernel_cpu
import kernel_gate
import kernel_gpu
from kernel_figures import Figure, show, write

PARTS = {
    "gate": kernel_gate.figures,
    "cpu": lambda: (kernel_cpu.figures(), []),
    "gpu": kernel_gpu.figures,
}
RESULT = Path("runs/bench/kernels.json")


def main() -> int:
    """Run the chosen parts; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, default=RESULT, help=f"default: {RESULT}")
    arguments = parser.parse_args()
    figures: list[Figure] = []
    notes: list[str] = []
    for part in arguments.parts:
        found, remarks = PARTS[part]()
        show(found)
        for remark in remarks:
            print(remark, flush=True)
        figures += found
        notes += remarks
    write(arguments.output, figures, notes)
    missed = [figure.name for figure in figures if figure.holds is False]
    print(f"{len(figures)} figures in {arguments.output}; bars missed: {len(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
