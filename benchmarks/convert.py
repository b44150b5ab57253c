"""Conversion both ways against a plain copy of the same bytes -> runs/bench/convert.json.

    python benchmarks/convert.py [--gigabytes 2.5] [--rounds 3] [--work FOLDER]

A model with random bf16 weights is written as a Hugging Face folder; then, in turn, its weight file
is copied, the folder becomes a training checkpoint, and that becomes a Hugging Face folder again.
Each is a process of its own and ends when its bytes are on the disk. Throughput leaves out what the
program takes to start (`--help`), which does not grow with the model; the seconds contain it.
Exits with 1 if a bar is missed: half the throughput of the copy, and 3 GB of memory, both ways.
"""

import argparse
import dataclasses
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from kernel_figures import Figure, at_least, at_most, show, write
from small_tokenizer import train_tokenizer
from torch import Tensor

from megatron_gmai.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_gmai.convert.huggingface import write_pretrained
from megatron_gmai.data.text.tokenizer import load_tokenizer
from megatron_gmai.weights import weights

SPEED_BAR = 0.5  # of the copy's throughput
PEAK_BAR_GB = 3.0  # whatever the model's size
ROOT = Path(__file__).resolve().parents[1]
COPY = """\
import os, sys
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as target:
    while os.sendfile(target.fileno(), source.fileno(), None, 1 << 24):
        pass
    os.fsync(target.fileno())
"""


class RandomWeights(Mapping[str, Tensor]):
    """bf16 weights of the scale of a trained model's, made when they are asked for."""

    def __init__(self, model: ModelConfig) -> None:
        self.shapes = {name: weight.shape for name, weight in weights(model).items()}
        self.block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        count = torch.Size(shape).numel()
        return 0.02 * self.block.repeat(-(-count // self.block.numel()))[:count].view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def make_model(folder: Path, gigabytes: float) -> None:
    """A Hugging Face folder of about that many bytes: GMAI-VL's widths with fewer layers."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = train_tokenizer(folder.parent)
    tokenizer = load_tokenizer(file)
    model = ModelConfig(VisionConfig(), LanguageConfig(num_layers=1, vocab_size=92544))
    sizes = {name: torch.Size(weight.shape).numel() for name, weight in weights(model).items()}
    one = sum(sizes.values())
    layer = sum(n for name, n in sizes.items() if name.startswith("language_model.decoder.layers"))
    layers = max(1, 1 + round((gigabytes * 1e9 / 2 - one) / layer))
    language = dataclasses.replace(model.language, num_layers=layers)
    model = dataclasses.replace(model, language=language, image_token_id=tokenizer.image_token_id)
    write_pretrained(
        folder,
        model,
        RandomWeights(model),
        tokenizer_model=file,
        special_tokens=tokenizer.special_tokens,
        reserved=tokenizer.reserved,
        chat_template="internlm2",
        dtype=torch.bfloat16,
        max_shard_bytes=1 << 62,
    )


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident gigabytes of a process that must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def measure(work: Path, rounds: int) -> dict[str, Any]:
    """Copy, from-hf and to-hf in turn, so that all of them meet the same state of the disk."""
    tool = [sys.executable, "tools/convert_checkpoint.py"]
    source = work / "hf"
    size = (source / "model.safetensors").stat().st_size
    commands = {
        "copy": [sys.executable, "-c", COPY, str(source / "model.safetensors"), str(work / "copy")],
        "from_hf": [
            *tool,
            "from-hf",
            "--model",
            str(source),
            "--output",
            str(work / "checkpoints"),
        ],
        "to_hf": [
            *tool,
            "to-hf",
            "--load",
            str(work / "checkpoints"),
            "--output",
            str(work / "out"),
        ],
    }
    start = min(measured([*tool, "--help"])[0] for _ in range(rounds))
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peaks = dict.fromkeys(commands, 0.0)
    for _ in range(rounds):
        for path in ("checkpoints", "out"):
            shutil.rmtree(work / path, ignore_errors=True)
        (work / "copy").unlink(missing_ok=True)
        for name, command in commands.items():
            took, peak = measured(command)
            seconds[name].append(took)
            peaks[name] = max(peaks[name], peak)
            print(f"{name:8} {took:6.1f} s, peak {peak:.2f} GB", flush=True)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "gigabytes": round(size / 1e9, 3),
        "rounds": rounds,
        "seconds": {name: [round(took, 2) for took in times] for name, times in seconds.items()},
        "peak_gigabytes": {name: round(peak, 2) for name, peak in peaks.items()},
        "throughput_against_copy": {
            name: round(middle["copy"] / (middle[name] - start), 3) for name in ("from_hf", "to_hf")
        },
        "start_seconds": round(start, 2),
        "cores": os.cpu_count(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "same_bytes": _same(source / "model.safetensors", work / "out" / "model.safetensors"),
    }


def _same(one: Path, two: Path) -> bool:
    return subprocess.run(["cmp", "--silent", str(one), str(two)]).returncode == 0


def figures_of(result: dict[str, Any]) -> list[Figure]:
    found = []
    for way in ("from_hf", "to_hf"):
        speed, peak = result["throughput_against_copy"][way], result["peak_gigabytes"][way]
        found.append(at_least(f"{way}: throughput against a copy", speed, "x", SPEED_BAR))
        found.append(at_most(f"{way}: peak memory", peak, "GB", PEAK_BAR_GB))
    return found


def main() -> int:
    """Returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.5, help="size of the weights (2.5)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts (3)")
    parser.add_argument("--work", help="folder for some four times that size (default: temporary)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.work) as folder:
        # In a process of its own: one that forks hands its peak memory down to its children.
        maker = multiprocessing.get_context("spawn").Process(
            target=make_model, args=(Path(folder) / "hf", flags.gigabytes)
        )
        maker.start()
        maker.join()
        result = measure(Path(folder), flags.rounds)
    figures = figures_of(result)
    show(figures)
    write(ROOT / "runs" / "bench" / "convert.json", figures, [], **result)
    return int(any(figure.holds is False for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
