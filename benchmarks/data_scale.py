"""An index of 14 million samples, and the memory of 10,000 batches.

The shards are real: each name is a link to one tar file of a thousand samples, so a resumed run
reads what it would read anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from kernel_figures import Figure, at_least, at_most

from megatron_gmai.config import DataConfig, VisionConfig
from megatron_gmai.data.loading.dataset import PackDataset, open_dataset
from megatron_gmai.data.loading.loader import iterate
from megatron_gmai.data.plan.plan import Bookmark, Plan
from megatron_gmai.data.plan.windows import PlanSettings, Windows
from megatron_gmai.data.shards.index import ShardFile, save_index, write_manifest
from megatron_gmai.data.shards.lengths import LENGTH_ROW
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.text.tokenizer import load_tokenizer

STEP = 512  # packs
EPOCHS = 4
PROCESSES = 8  # of a node
BATCHES = 640  # of one process: ten steps
VISION = VisionConfig(image_size=28)  # four tokens an image: the files are small, not the index


def open_shards(folder: Path) -> PackDataset:
    """The data set as a run opens it."""
    data = DataConfig(
        shards=str(folder), tokenizer=str(folder / "tokenizer.model"), dset_pack_level="best-fit"
    )
    tokenizer = load_tokenizer(str(data.tokenizer))
    return open_dataset(data, tokenizer, VISION, 1, None, run=STEP)


def planning(lengths: np.ndarray) -> dict[str, float]:
    """Samples planned a second, and milliseconds for each of some hundred steps in a row."""
    table = np.zeros(len(lengths), dtype=LENGTH_ROW)
    table["length"] = lengths
    shards = len(lengths) // 1000
    sources = np.sort(np.random.default_rng(0).integers(0, 20, shards))
    settings = PlanSettings(1, 2048, "best-fit")
    plan = Plan(Windows(table, np.arange(shards + 1) * 1000, sources, [1.0] * 20, settings))
    start = time.process_time()
    total = plan.total(0)
    epoch = time.process_time() - start
    steps = min(400, total // STEP)
    start = time.process_time()
    for step in range(steps):
        plan.packs(step * STEP, (step + 1) * STEP)
    each = (time.process_time() - start) / steps + epoch / (total / STEP)
    return {"samples_per_s": len(lengths) / epoch, "ms_per_step": 1000 * each}


def enlarge(small: Path, large: Path, samples: int) -> None:
    """Writes an index that repeats the samples of `small`, one tar file, under new shard names."""
    shards = Shards(small)
    open_shards(small)  # leaves the token lengths
    (tar,) = shards.manifest.shards
    times = samples // len(shards)
    large.mkdir()
    names = [f"{number:05d}.tar" for number in range(times)]
    for name in names:
        os.symlink(small / tar.name, large / name)
    rows = np.tile(np.array(shards.rows), times)
    rows["shard"] = np.repeat(np.arange(times), len(shards))
    save_index(large, rows)
    (table,) = small.glob("lengths-*.npy")
    np.save(large / table.name, np.tile(np.load(table), times))
    for name in ("tokenizer.model", table.with_suffix(".rejected.jsonl").name):
        (large / name).write_bytes((small / name).read_bytes())
    files = tuple(ShardFile(name, len(shards), tar.size) for name in names)
    source = dataclasses.replace(shards.manifest.sources[0], samples=len(rows))
    write_manifest(large, dataclasses.replace(shards.manifest, shards=files, sources=(source,)))


def own_mb() -> float:
    """Memory of this process that is no file's (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return int(fields["Anonymous"]) / 1024


def resumed(folder: Path, middle: int, bookmark: dict[str, Any] | None) -> dict[str, float]:
    """Seconds to open the data and to the first batch at pack `middle`, milliseconds for each one
    after it, this process's own memory for it and for planning some hundred steps, and the size of
    the files that all processes map together."""
    before, start = own_mb(), time.perf_counter()
    dataset = open_shards(folder)
    rows = len(dataset.shards.rows)
    opened = time.perf_counter() - start
    if bookmark is not None:
        dataset.open_at(Bookmark(**bookmark))
    batches = iterate(dataset, 0, PROCESSES, 1, STEP, middle, dataset.total_packs(EPOCHS))
    next(batches)
    first = time.perf_counter() - start
    start = time.process_time()
    for _ in range(BATCHES):
        next(batches)
    each = (time.process_time() - start) / BATCHES
    for step in range(200):
        dataset.plan.packs(middle + step * STEP, middle + (step + 1) * STEP)
    mapped = sum(file.stat().st_size for file in folder.glob("*.npy") if "plan" not in file.name)
    return {
        "samples": rows,
        "open_s": opened,
        "first_batch_s": first,
        "ms_per_batch": 1000 * each,
        "own_mb": own_mb() - before,
        "mapped_mb": mapped / 2**20,
    }


def in_new_process(folder: Path, middle: int, bookmark: Bookmark | None) -> dict[str, float]:
    """`resumed` by a process that has seen nothing, on files without any plan."""
    for file in folder.glob("plan-*"):
        file.unlink()
    known = None if bookmark is None else dataclasses.asdict(bookmark)
    command = [sys.executable, __file__, str(folder), str(middle), json.dumps(known)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def batch_growth(small: PackDataset, large: PackDataset) -> float:
    """Time of a batch from a large index over that of a batch from a small one. They take turns,
    and each counts with its best."""
    times: dict[PackDataset, list[float]] = {small: [], large: []}
    for _ in range(3):
        for dataset, found in times.items():
            dataset.total_packs(EPOCHS)
            run = in_new_process(dataset.shards.folder, 0, dataset.bookmark(0))
            found.append(run["ms_per_batch"])
    return min(times[large]) / min(times[small])


def scale_figures(small: Path, lengths: np.ndarray) -> list[Figure]:
    """Planning, opening and resuming with as many samples as `lengths`, in the middle of epoch 3 of
    4, with a checkpoint's bookmark and without."""
    # In turns, and the best counts: a machine that is busy elsewhere only adds time.
    rounds = [(planning(lengths[:100_000]), planning(lengths)) for _ in range(3)]
    few, many = (
        min(side, key=lambda run: run["ms_per_step"]) for side in zip(*rounds, strict=True)
    )
    medium, large = small.parent / "medium", small.parent / "large"
    enlarge(small, medium, 100_000)
    enlarge(small, large, len(lengths))
    dataset = open_shards(large)
    start = time.perf_counter()
    dataset.total_packs(EPOCHS)
    counting = (time.perf_counter() - start) / EPOCHS
    middle = dataset.total_packs(3.5) // STEP * STEP
    batch = batch_growth(open_shards(medium), dataset)
    run = in_new_process(large, middle, dataset.bookmark(middle))
    without = in_new_process(large, middle, None)
    growth = many["ms_per_step"] / few["ms_per_step"]
    memory = run["mapped_mb"] + PROCESSES * run["own_mb"]
    return [
        at_least("planning, 14M samples", many["samples_per_s"] / 1e6, "M samples/s", 1.0),
        Figure("planning a step, 100k samples", few["ms_per_step"], "ms"),
        at_most("planning a step, 14M over 100k samples", growth, "x", 1.5),
        at_most("a batch, 14M over 100k samples", batch, "x", 1.2),
        at_most("open an index of 14M samples", run["open_s"], "s", 2.0),
        at_most(f"memory of {PROCESSES} processes for it", memory, "MB", 500.0),
        Figure("of it files that all of them map", run["mapped_mb"], "MB"),
        Figure("of it own memory of each process", run["own_mb"], "MB"),
        at_most(
            "first batch of a resume in epoch 3, no plan files", run["first_batch_s"], "s", 5.0
        ),
        Figure("the same from a checkpoint without a bookmark", without["first_batch_s"], "s"),
        Figure("counting an epoch's packs at a first start", counting, "s"),
    ]


def memory_figures(dataset: PackDataset, batches: int) -> list[Figure]:
    """Growth of the resident memory by batch, from a tenth of the batches on."""
    import psutil

    process, sizes = psutil.Process(), []
    loader = iterate(dataset, 0, 1, 1, 8)
    for number in range(batches):
        next(loader)
        if number >= batches // 10 and number % 100 == 0:
            sizes.append((number, process.memory_info().rss))
    numbers, rss = np.array(sizes, dtype=float).T
    slope = float(np.polyfit(numbers, rss, 1)[0])
    return [
        at_most(f"memory slope over {batches} batches", slope, "bytes/batch", 100.0),
        Figure("the same in all", (rss[-1] - rss[0]) / 2**20, "MB"),
    ]


if __name__ == "__main__":
    print(json.dumps(resumed(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))))
