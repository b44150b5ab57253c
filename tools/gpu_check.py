"""Checks this project on the GPUs of this machine, in some minutes.

    python tools/gpu_check.py [--output runs/gpu_check] [--only parity memory ...]

parity: training steps in fp32 and bf16 against one process on the CPU; memory: a dry run against
the allocator; attention and kernels: times; quick start: phases 1 and 2; speed: tokens a second and
MFU of the largest model that fits. Writes check.json and check.html; exits with 1 where a bar is
missed, with 2 where there is no GPU.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the quick start

import torch  # noqa: E402

from megatron_gmai.config import Config  # noqa: E402
from megatron_gmai.gpu_check.finding import Finding, failed  # noqa: E402
from megatron_gmai.runtime.device import choose_device, why_no_gpu  # noqa: E402
from megatron_gmai.runtime.quiet import quiet_libraries  # noqa: E402

Check = Callable[[Path], Iterator[Finding]]
SHARE = 0.92  # of a GPU's memory, for tensors: the rest is the driver's, NCCL's and fragmentation
KERNEL_SECONDS = 170


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"gpu_check: torch sees no GPU: {why_no_gpu() or 'this machine has none'}")
        return 2
    quiet_libraries()
    chosen = {name: CHECKS[name] for name in arguments.only}
    return report(chosen, about_machine(), arguments.output)


def report(checks: dict[str, Check], about: dict[str, Any], output: Path) -> int:
    """Run the checks, print a line for each finding, write both files; the exit status."""
    from megatron_gmai.gpu_check.page import render_page, shown, verdict

    output.mkdir(parents=True, exist_ok=True)
    began, findings = time.monotonic(), list[Finding]()
    for name, check in checks.items():
        for finding in guarded(name, check, output):
            word = {True: "holds", False: "MISSED", None: ""}[finding.holds]
            print(f"{finding.check:12}{finding.name:56}{shown(finding):>22}  {word}", flush=True)
            findings.append(finding)
    seconds = time.monotonic() - began
    rows = [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in vars(f).items()}
        for f in findings
    ]
    content = {"machine": about, "seconds": seconds, "findings": rows}
    (output / "check.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    page = render_page(findings, about, seconds)
    (output / "check.html").write_text(page, encoding="utf-8")
    print(f"{verdict(findings)}; {output / 'check.html'}")
    return 1 if any(finding.holds is False for finding in findings) else 0


def guarded(name: str, check: Check, output: Path) -> Iterator[Finding]:
    """What a check finds; its failure is a finding too, and the next check runs."""
    try:
        yield from check(output)
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        yield failed(name, "the check itself", reason)


def about_machine() -> dict[str, Any]:
    from megatron_gmai.runtime.environment import describe_environment
    from megatron_gmai.runtime.implementation import choose_implementation

    implementation = choose_implementation(choose_device("cuda"))
    return {**describe_environment(), "implementation": str(implementation)}


def parity(output: Path) -> Iterator[Finding]:
    from megatron_gmai.gpu_check.parity import parity

    yield from parity("cuda", torch.cuda.device_count())


def memory(output: Path) -> Iterator[Finding]:
    from megatron_gmai.gpu_check.memory import memory

    yield from memory(two_layers(), "cuda", images=3)


def attention(output: Path) -> Iterator[Finding]:
    from megatron_gmai.gpu_check.speed import attention_times
    from megatron_gmai.runtime.processes import in_processes

    for segments in (3, 32):
        yield from in_processes(1, 60, attention_times, two_layers(8192), "cuda", segments)


def two_layers(length: int = 2048) -> Config:
    """gmai-vl-7b with two decoder layers: as wide, and it fits on any of these GPUs."""
    from megatron_gmai.gpu_check.steps import replaced
    from megatron_gmai.planner.cost import with_vocabulary

    config = with_vocabulary(Config())
    language = dataclasses.replace(config.model.language, num_layers=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, language=language))
    return replaced(replaced(config, "data", max_length=length), "train", global_batch_size=2)


def kernels(output: Path) -> Iterator[Finding]:
    """The benchmark of the fused kernels, in a process of its own."""
    result = output / "kernels.json"
    words = [sys.executable, "benchmarks/kernels.py", "--parts", "gpu", "--output"]
    subprocess.run([*words, str(result.resolve())], cwd=ROOT, timeout=KERNEL_SECONDS, check=True)
    for row in json.loads(result.read_text(encoding="utf-8"))["figures"]:
        yield Finding("kernels", **row)


def quick_start(output: Path) -> Iterator[Finding]:
    from examples.quickstart.run import first_phases

    began = time.monotonic()
    for name, losses in first_phases(output / "quickstart", 2).items():
        yield Finding(
            "quick start", f"{name}: last loss over first", losses[-1] / losses[0], "x",
            "below 1", losses[-1] < losses[0], f"{losses[0]:.3f} to {losses[-1]:.3f}",
        )  # fmt: skip
    yield Finding("quick start", "with its data", time.monotonic() - began, "s")


def speed(output: Path) -> Iterator[Finding]:
    from megatron_gmai.gpu_check.speed import fastest_training

    total = torch.cuda.get_device_properties(0).total_memory
    yield from fastest_training(torch.cuda.device_count(), SHARE * total / 2**30)


CHECKS: dict[str, Check] = {
    "parity": parity,
    "memory": memory,
    "attention": attention,
    "speed": speed,
    "quick-start": quick_start,
    "kernels": kernels,
}

if __name__ == "__main__":
    sys.exit(main())
