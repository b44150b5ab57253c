"""CPU part of the kernel benchmark: memory and time of the fused loss, time of RMSNorm.

Each way to compute the loss runs in a process of its own, because a peak of resident memory is the
peak of a process. Time is CPU seconds of all threads, waiting threads asleep, so that a busy
machine does not change a ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from kernel_figures import Figure, at_least, at_most
from torch import Tensor

from gmai_kernels import linear_cross_entropy, rms_norm

THREADS = 2
TOKENS, HIDDEN, VOCABULARY = 2048, 1024, 92544
REPEATS = 2
NORM_REPEATS = 60

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "full logits": lambda hidden, weight, labels: F.cross_entropy(hidden @ weight.T, labels),
    "F.linear_cross_entropy": lambda hidden, weight, labels: F.linear_cross_entropy(
        hidden, weight, labels
    ),
    "fused": lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels).mean(),
}


def figures() -> list[Figure]:
    """Run all CPU measurements; under two minutes on two idle cores."""
    found = []
    for frozen in (False, True):
        state = "frozen" if frozen else "trained"
        results = {name: _in_own_process(name, frozen) for name in LOSSES}
        for name, result in results.items():
            label = f"cpu, output layer {state}, {name}"
            found.append(Figure(f"{label}: time", result["seconds"], "CPU s"))
            found.append(Figure(f"{label}: peak extra memory", result["mebibytes"], "MiB"))
        fused = results.pop("fused")
        share = fused["mebibytes"] / results["full logits"]["mebibytes"]
        label = f"cpu, output layer {state}, fused / "
        found.append(
            at_most(f"{label}full logits: memory", share, "x", 1 / 12 if frozen else 1 / 4)
        )
        for name, other in results.items():
            ratio = fused["seconds"] / other["seconds"]
            found.append(at_most(f"{label}{name}: time", ratio, "x", 1.05))
    return found + _rms_norm_figures()


def _in_own_process(op: str, frozen: bool = False) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, __file__, op] + ["--frozen"] * frozen
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(output.stdout)
    return result


def _measure_loss(loss: Loss, frozen: bool) -> dict[str, float]:
    """CPU seconds of forward and backward (best of REPEATS) and peak memory above the inputs."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN).requires_grad_()
    weight = torch.empty(VOCABULARY, HIDDEN).normal_(std=0.02).requires_grad_(not frozen)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    loss(hidden[:8], weight[:8], labels[:8] % 8).backward()  # libraries loaded, buffers made
    seconds, peak = [], 0.0
    for _ in range(REPEATS):
        hidden.grad = weight.grad = None
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _resident("VmRSS")
        start = time.process_time()
        loss(hidden, weight, labels).backward()
        seconds.append(time.process_time() - start)
        peak = max(peak, _resident("VmHWM") - before)
    return {"seconds": min(seconds), "mebibytes": peak}


def _resident(key: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _rms_norm_figures() -> list[Figure]:
    found = []
    for label, seconds in _in_own_process("rms_norm").items():
        found.append(Figure(f"cpu, RMSNorm {label}: time", seconds["fused"] * 1e3, "CPU ms"))
        speedup = seconds["eager"] / seconds["fused"]
        found.append(at_least(f"cpu, RMSNorm {label}: eager / fused time", speedup, "x", 2))
    return found


def _measure_norms() -> dict[str, dict[str, float]]:
    """CPU seconds of forward and backward by dtype and way, median of NORM_REPEATS, in turns.

    The best would compare the eager formula's rare runs without page faults: its temporaries are
    given back to the system and taken again in nearly all of them.
    """

    def eager(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (wide * r * weight.float()).to(x.dtype)

    results = {}
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        x = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
        weight = torch.ones(HIDDEN, dtype=dtype).requires_grad_()
        dy = torch.randn(TOKENS, HIDDEN).to(dtype)
        seconds: dict[str, list[float]] = {"eager": [], "fused": []}
        for _ in range(NORM_REPEATS):
            for name, norm in (("eager", eager), ("fused", rms_norm)):
                start = time.process_time()
                torch.autograd.grad(norm(x, weight, 1e-5), (x, weight), dy)
                seconds[name].append(time.process_time() - start)
        results[label] = {name: median(values) for name, values in seconds.items()}
    return results


def main() -> None:
    """Measure one way to compute the loss, or RMSNorm, and print the result as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("op", choices=(*LOSSES, "rms_norm"))
    parser.add_argument("--frozen", action="store_true", help="the output layer is not trained")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    if arguments.op == "rms_norm":
        print(json.dumps(_measure_norms()))
    else:
        print(json.dumps(_measure_loss(LOSSES[arguments.op], arguments.frozen)))


if __name__ == "__main__":
    main()
