"""Figures of making shards, side by side in one run: `python benchmarks/data_build.py`.

Writes runs/bench/data_build.json. The limit of the machine is measured beside: as many processes
that read the same JPEGs, decode each once at reduced size and write it to files that are as safe on
the disk as shards are. Starting the workers counts as building. Exits with 1 if a bar is missed.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from kernel_figures import Figure, at_least, at_most, show, write
from PIL import Image

from megatron_gmai.data.shards.build import build_shards
from megatron_gmai.data.shards.units import RECORDS_PER_SHARD

SIZE = (320, 256)
ROUNDS = 3
DISTINCT = 500  # pictures; the others are copies of them
HUGE = (10_000, 10_000)
ANSWER = "the image shows a region of bright tissue with a dark border on the left side " * 3
PEAK = """
import resource, sys
from megatron_gmai.data.shards.build import build_shards
build_shards(sys.argv[1], sys.argv[2], workers=2)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def main() -> int:
    """Returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--output", default="runs/bench/data_build.json")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        names = make_images(Path(folder), flags.images)
        figures = speeds(Path(folder), names)
        figures.append(peak_memory(Path(folder), names[:2000]))
    show(figures)
    write(Path(flags.output), figures, [])
    return int(any(figure.holds is False for figure in figures))


def make_images(folder: Path, count: int) -> list[str]:
    """Smooth JPEGs of 24 KB, a thousand in a folder, and a list file that names them."""
    generator = np.random.default_rng(0)
    names: list[str] = []
    for number in range(count):
        name = f"{number // 1000:03d}/{number:06d}.jpg"
        (folder / name).parent.mkdir(exist_ok=True)
        if number < DISTINCT:
            coarse = generator.integers(0, 256, (32, 40, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BILINEAR)
            image.save(folder / name, quality=90)
        else:
            shutil.copyfile(folder / names[number % DISTINCT], folder / name)
        names.append(name)
    write_list(folder, names)
    return names


def write_list(folder: Path, names: list[str]) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": ANSWER}]
    records = [{"image": name, "conversations": turns} for name in names]
    (folder / "data.json").write_text(json.dumps(records))
    entry = {"image_dir": str(folder), "annotations": str(folder / "data.json")}
    (folder / "list.json").write_text(json.dumps({"A": entry}))


def speeds(folder: Path, names: list[str]) -> list[Figure]:
    """Records a second. The ways take turns, so that a machine that slows down slows all of them;
    each counts with its best round."""
    ways: dict[str, Callable[[], None]] = {
        "limit of 2 processes": lambda: limit(folder, names, 2),
        "2 workers": lambda: build(folder, 2),
        "1 worker": lambda: build(folder, 1),
        "no worker": lambda: build(folder, 0),
    }
    best = dict.fromkeys(ways, 0.0)
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = max(best[name], len(names) / (time.perf_counter() - start))
    two = best["2 workers"]
    return [
        *(Figure(f"shards, {name}", value, "records/s") for name, value in best.items()),
        at_least("shards, 2 workers over the limit", two / best["limit of 2 processes"], "x", 0.7),
        at_least("shards, 2 workers over 1", two / best["1 worker"], "x", 1.6),
    ]


def build(folder: Path, workers: int) -> None:
    output = folder / "shards"
    build_shards(folder / "list.json", output, workers=workers)
    shutil.rmtree(output)


def limit(folder: Path, names: list[str], processes: int) -> None:
    parts = [names[start : start + RECORDS_PER_SHARD] for start in range(0, len(names), 1000)]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        pool.starmap(read_decode_write, [(folder, part) for part in parts], 1)


def read_decode_write(folder: Path, names: list[str]) -> None:
    file = folder / f"limit-{os.getpid()}"
    with file.open("wb", buffering=2**20) as out:
        for name in names:
            data = (folder / name).read_bytes()
            simplejpeg.decode_jpeg(data, "RGB", False, False, 1, 1)
            out.write(data)
        out.flush()
        os.fsync(out.fileno())
    file.unlink()


def peak_memory(folder: Path, names: list[str]) -> Figure:
    """The most memory of a worker, with one image of 100 megapixels among the small ones."""
    ramp = np.linspace(0, 255, HUGE[0]).astype(np.uint8)
    rows = np.broadcast_to(ramp[None, :, None], (HUGE[1], HUGE[0], 3))
    Image.fromarray(np.ascontiguousarray(rows)).save(folder / "huge.jpg", quality=90)
    write_list(folder, [*names, "huge.jpg"])
    command = [sys.executable, "-c", PEAK, str(folder / "list.json"), str(folder / "peak")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    megabytes = int(done.stdout) * 1024 / 1e6
    return at_most("shards, peak memory of a worker, 100 megapixels", megabytes, "MB", 500)


if __name__ == "__main__":
    sys.exit(main())
