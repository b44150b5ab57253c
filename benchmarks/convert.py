"""Conversion both ways against a plain copy of the same bytes -> runs/bench/convert.json.

    python benchmarks/convert.py [--gigabytes 2.5] [--rounds 3] [--work FOLDER]

A model with random bf16 weights is written as a Hugging Face folder. In every round its file of
weights is copied and the folder becomes a training checkpoint; then it is copied again and the
checkpoint becomes a Hugging Face folder. Each is a process of its own and ends when its bytes are
on the disk. A conversion is compared with the copy right before it, so that others who use the disk
meet both; the median of the rounds counts. Rounds take turns: warm, what is read lies in the page
cache, so that the copy waits for nothing but its writes; cold, it lies on the disk.
Throughput leaves out what the program takes to start (`--help`, timed in each pair), which does not
grow with the model; the seconds contain it.
Exits with 1 if a bar is missed: half the throughput of a warm copy, and 3 GB of memory, both ways.
"""

import argparse
import dataclasses
import filecmp
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

WAYS = ("from_hf", "to_hf")
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


@dataclasses.dataclass(frozen=True)
class Pair:
    """A conversion, and right before it the copy and a start of the program, in seconds."""

    copy: float
    start: float
    conversion: float
    peak_gigabytes: float

    @property
    def ratio(self) -> float:
        """Throughput of the conversion against that of the copy."""
        return self.copy / (self.conversion - self.start)


def measure_pair(work: Path, way: str, is_cold: bool) -> Pair:
    """Copy the file of weights, then convert; both begin with what they read in the page cache,
    or, cold, with none of it."""
    source, copy, checkpoints, out = (work / n for n in ("hf", "copy", "checkpoints", "out"))
    weights_file = source / "model.safetensors"
    tool = [sys.executable, "tools/convert_checkpoint.py"]
    if way == "from_hf":
        read, target = [weights_file], checkpoints
        command = [*tool, "from-hf", "--model", str(source), "--output", str(target)]
    else:
        read, target = list((checkpoints / "iter_0000000").iterdir()), out
        command = [*tool, "to-hf", "--load", str(checkpoints), "--output", str(target)]
    copy.unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    settle([weights_file], is_cold)
    copied, _ = measured([sys.executable, "-c", COPY, str(weights_file), str(copy)])
    copy.unlink()
    settle(read, is_cold)
    started, _ = measured([*tool, "--help"])
    took, peak = measured(command)
    state = "cold" if is_cold else "warm"
    print(f"{way:8} {state} {took:6.1f} s, copy {copied:6.1f} s, peak {peak:.2f} GB", flush=True)
    return Pair(copied, started, took, peak)


def settle(files: list[Path], is_cold: bool) -> None:
    """Leave the disk nothing to write, and the page cache all of `files`, or none of them."""
    os.sync()
    for path in files:
        with path.open("rb") as file:
            if is_cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def measure(work: Path, rounds: int) -> dict[str, Any]:
    """Rounds of copy, from-hf, copy, to-hf, warm and cold in turn."""
    source = work / "hf" / "model.safetensors"
    pairs: dict[str, list[Pair]] = {}
    for number in range(2 * rounds):
        for way in WAYS:
            found = measure_pair(work, way, is_cold=number % 2 == 1)
            pairs.setdefault(f"{way}_{'cold' if number % 2 else 'warm'}", []).append(found)
    if not filecmp.cmp(source, work / "out" / source.name, shallow=False):
        raise RuntimeError("the weights did not come back bit by bit")
    return {
        "gigabytes": round(source.stat().st_size / 1e9, 3),
        "throughput_against_copy": {
            name: round(statistics.median(pair.ratio for pair in found), 3)
            for name, found in pairs.items()
        },
        "peak_gigabytes": {
            way: round(max(pair.peak_gigabytes for pair in pairs[f"{way}_warm"]), 2) for way in WAYS
        },
        "pairs": {name: [dataclasses.asdict(p) for p in found] for name, found in pairs.items()},
        "cores": os.cpu_count(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }


def figures_of(result: dict[str, Any]) -> list[Figure]:
    """The figures with bars, and cold throughput beside them."""
    found = []
    for way in WAYS:
        speed, peak = result["throughput_against_copy"], result["peak_gigabytes"][way]
        name = f"{way}: throughput against a copy"
        found.append(at_least(name, speed[f"{way}_warm"], "x", SPEED_BAR))
        found.append(Figure(f"{name}, read from the disk", speed[f"{way}_cold"], "x"))
        found.append(at_most(f"{way}: peak memory", peak, "GB", PEAK_BAR_GB))
    return found


def main() -> int:
    """Returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.5, help="size of the weights (2.5)")
    parser.add_argument("--rounds", type=int, default=3, help="warm, and as many cold (3)")
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
