"""Figures of the data pipeline, side by side in one run: `python benchmarks/data.py`.

Writes runs/bench/data.json. Every comparison is a ratio of two things measured in this run on this
machine: throughput to packed batches against the plain ways to load the same images, the fill of
packs, the evenness of the work of data-parallel ranks; memory, and a large index
(`data_scale.py`). Exits with 1 if a bar is missed.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import simplejpeg
import torch
import webdataset
from data_scale import VISION, memory_figures, open_shards, scale_figures
from kernel_figures import Figure, at_least, at_most, show, write
from PIL import Image

from megatron_gmai.config import DataConfig, VisionConfig
from megatron_gmai.data.loading.dataset import PackDataset, open_dataset
from megatron_gmai.data.loading.loader import iterate
from megatron_gmai.data.plan.balance import assign, pack_costs
from megatron_gmai.data.plan.packing import Packs, pack_best_fit, pack_none, pack_soft
from megatron_gmai.data.prepare import prepare_data
from megatron_gmai.data.text.tokenizer import load_tokenizer

SIDE = 336
# Passes over the images in one measurement: more for what is quicker.
QUICK, SLOW = 12, 2
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
TEXT = "the image shows a region of bright tissue with a dark border on the left side"
WORDS = TEXT.split()


def main() -> int:
    """Returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--samples", type=int, default=14_000_000, help="of the synthetic index")
    parser.add_argument("--batches", type=int, default=10_000, help="for the memory's slope")
    parser.add_argument("--output", default="runs/bench/data.json")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    figures: list[Figure] = []
    for part in parts(flags.images, flags.samples, flags.batches):
        show(part)
        figures += part
    write(Path(flags.output), figures, [])
    return int(any(figure.holds is False for figure in figures))


def parts(images: int, samples: int, batches: int) -> Iterator[list[Figure]]:
    """All figures, in the order in which they are measured."""
    with tempfile.TemporaryDirectory() as folder:
        small = make_data(Path(folder), 1000, (28, 28), VISION).shards.folder
        shutil.copyfile(Path(folder) / "tokenizer.model", small / "tokenizer.model")
        # First: memory that other parts have given back would hide what grows.
        yield memory_figures(open_shards(small), batches)
        yield fill()
        yield evenness()
        with tempfile.TemporaryDirectory() as pictures:
            yield throughput(Path(pictures), images)
        for file in small.glob("lengths-*"):
            file.unlink()
        yield scale_figures(small, length_mix(samples)[0])


def length_mix(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and images of the usual mix: three quarters of the samples have an image (576 tokens
    and lognormal text of mean 150), the others are text (lognormal of mean 300)."""
    generator = np.random.default_rng(0)
    images = (generator.random(count) < 0.75).astype(np.int64)
    mean = np.where(images == 1, 150.0, 300.0)
    text = np.exp(generator.normal(np.log(mean) - 0.18, 0.6))
    return (576 * images + text).astype(np.int64).clip(8, 2048), images


def fill() -> list[Figure]:
    """Share of the tokens of all packs that belong to samples, in per cent."""
    lengths, _ = length_mix(100_000)
    figures = []
    for limit, bar in ((2048, 97.5), (4096, 99.9)):
        packs = {
            "none": pack_none(lengths),
            "soft": pack_soft(lengths, limit),
            "best-fit": pack_best_fit(lengths[:32_768], limit),
        }
        for name, p in packs.items():
            share = 100 * float((p.stops - p.starts).sum() / (limit * len(p)))
            title = f"fill at {limit}, {name}"
            best = name == "best-fit"
            figures.append(at_least(title, share, "%", bar) if best else Figure(title, share, "%"))
    return figures


def evenness() -> list[Figure]:
    """Slowest rank over the mean of all, for images and attention: over a step, in the worst step
    of all; and of the packs that run at one time, the mean over all of them.

    Images are whole, so with few packs a rank no deal keeps every step below 1.03: there the worst
    step is compared with what is possible, and the bar is for the mean.
    """
    lengths, images = length_mix(65_536)
    packs = pack_best_fit(lengths, 2048)
    packs = packs.reordered(np.random.default_rng(1).permutation(len(packs)))
    eight = uneven(packs, images, dp=8, step=512)
    few, many = (uneven(packs, images, dp=64, step=step) for step in (512, 1024))
    return [
        *(
            at_most(f"DP 8, {n}, worst of {len(u)} steps", max(u), "x", 1.01)
            for n, u in steps(eight)
        ),
        *(
            at_most(f"DP 8, {n}, one pack a rank", float(np.mean(eight[f"{n} at once"])), "x", 1.10)
            for n in ("images", "attention")
        ),
        *(
            at_most(f"DP 64, {n}, worst of {len(u)} steps", max(u), "x", 1.03)
            for n, u in steps(many)
        ),
        *(
            at_most(f"DP 64, 8 packs a rank, {n}, mean step", float(np.mean(u)), "x", 1.03)
            for n, u in steps(few)
        ),
        at_most("DP 64, 8 packs a rank, attention, worst step", max(few["attention"]), "x", 1.03),
        Figure("DP 64, 8 packs a rank, images, worst step", max(few["images"]), "x"),
        at_most(
            "DP 64, 8 packs a rank, images, worst over least",
            max(np.array(few["images"]) / np.array(few["least images"])),
            "x",
            1.001,
        ),
    ]


def steps(ratios: dict[str, list[float]]) -> Iterator[tuple[str, list[float]]]:
    """Of images and of attention, each step's ratio."""
    return ((name, ratios[name]) for name in ("images", "attention"))


def uneven(packs: Packs, images: np.ndarray, dp: int, step: int) -> dict[str, list[float]]:
    """Slowest rank over the mean of all in every step of so many packs, by what is counted."""
    found: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(packs) - step, step):
        costs = pack_costs(packs.part(start, start + step), images)
        order = assign(costs[0], costs[1], dp, 1)
        mean = costs[0].sum() / dp
        found["least images"].append(float(np.ceil(mean) / mean))
        for name, cost in zip(("images", "attention"), costs, strict=True):
            whole, single = cost[order].sum(axis=(0, 2)), cost[order].sum(axis=2)
            found[name].append(float(whole.max() / whole.mean()))
            ratios = single.max(axis=1) / np.maximum(single.mean(axis=1), 1e-9)
            found[f"{name} at once"].append(float(ratios.mean()))
    return found


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def throughput(folder: Path, count: int, rounds: int = 5) -> list[Figure]:
    """Images per second to a batch with 0 and 2 worker processes, as ratios of this run.

    The ways take turns, so that a machine that slows down slows all of them; each counts with its
    best round. The decode limit is that of as many processes, decoding and nothing else.
    """
    dataset = make_data(folder, count, (512, 384), VisionConfig())
    names = [str(path) for path in sorted(folder.glob("*.jpg"))]
    (tar,) = (folder / "shards").glob("*.tar")
    figures = []
    for workers in (0, 2):
        best: dict[str, float] = {}
        for _ in range(rounds):
            speeds = {
                "limit": decode_limit(names * QUICK, max(workers, 1)),
                "ours": speed(ours(dataset, workers)),
                "plain": speed(plain(folder, workers)),
                "webdataset": speed(stream(tar, workers)),
            }
            best = {name: max(best.get(name, 0.0), value) for name, value in speeds.items()}
        title = f"loader, {workers} workers, over"
        figures += [
            Figure(f"loader, {workers} workers", best["ours"], "images/s"),
            at_least(f"{title} JSON list and Pillow", best["ours"] / best["plain"], "x", 3.5),
            at_least(f"{title} WebDataset", best["ours"] / best["webdataset"], "x", 3.0),
            at_least(f"{title} the JPEG decode limit", best["ours"] / best["limit"], "x", 0.5),
        ]
    return figures


def decode_limit(names: list[str], processes: int) -> float:
    """JPEGs decoded a second by as many processes."""
    context = multiprocessing.get_context("fork")
    with context.Pool(processes) as pool:
        pool.map(decode_all, [names[:8]] * processes, 1)
        share = len(names) // processes
        parts = [names[n * share : (n + 1) * share] for n in range(processes)]
        _, seconds = timed(lambda: pool.map(decode_all, parts, 1))
    return share * processes / seconds


def decode_all(names: list[str]) -> None:
    for name in names:
        simplejpeg.decode_jpeg(Path(name).read_bytes(), "RGB", False, False)


def speed(batches: Iterator[int]) -> float:
    """Images per second, from the first batch on: starting processes is not the subject."""
    next(batches)
    begin = time.perf_counter()
    seen = sum(batches)
    return seen / (time.perf_counter() - begin)


def make_data(folder: Path, count: int, size: tuple[int, int], vision: VisionConfig) -> PackDataset:
    """Smooth JPEGs of `size`, one question each, as shards."""
    generator = np.random.default_rng(0)
    records = []
    for number in range(count):
        coarse = generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"{number:05d}.jpg", quality=90)
        text = " ".join(generator.choice(WORDS, 100))
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": text}]
        records.append({"image": f"{number:05d}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    entry = {"image_dir": str(folder), "annotations": str(folder / "data.json")}
    (folder / "list.json").write_text(json.dumps({"A": entry}))
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(WORDS * 50),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        normalization_rule_name="identity",
    )
    data = DataConfig(
        datasets=str(folder / "list.json"),
        tokenizer=str(folder / "tokenizer.model"),
    )
    data = prepare_data(data, vision, folder / "shards")
    return open_dataset(data, load_tokenizer(str(data.tokenizer)), vision, 1, None)


def ours(dataset: PackDataset, workers: int) -> Iterator[int]:
    total = dataset.total_packs(QUICK)
    for batch in iterate(dataset, 0, 1, 5, 5, 0, total, num_workers=workers):
        yield len(batch.pixel_values)


def plain(folder: Path, workers: int) -> Iterator[int]:
    """A JSON list, Pillow and a float normalisation."""
    records = json.loads((folder / "data.json").read_text()) * SLOW
    data = PlainImages(folder, [record["image"] for record in records])
    loader = torch.utils.data.DataLoader(
        data, 16, num_workers=workers, multiprocessing_context="fork" if workers else None
    )
    for batch in loader:
        yield len(batch)


class PlainImages(torch.utils.data.Dataset):
    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> torch.Tensor:
        return preprocess(Image.open(self.folder / self.names[number]))


def preprocess(image: Image.Image) -> torch.Tensor:
    """Square with the mean colour, bicubic, normalised floats [3, SIDE, SIDE]."""
    square = Image.new("RGB", (max(image.size),) * 2, tuple(int(255 * m) for m in CLIP_MEAN))
    square.paste(
        image.convert("RGB"),
        ((square.width - image.width) // 2, (square.height - image.height) // 2),
    )
    pixels = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy(((pixels / 255 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1).copy())


def stream(tar: Path, workers: int) -> Iterator[int]:
    """WebDataset's own pipeline over the same tar file, the same preprocessing. Each worker reads
    the only shard whole, so two workers deliver it twice."""
    repeats = SLOW // max(workers, 1)
    dataset = webdataset.WebDataset(
        [str(tar)] * repeats,
        nodesplitter=None,
        workersplitter=None,
        shardshuffle=False,
    )
    dataset = dataset.decode("pil").map(lambda sample: (preprocess(sample["0.jpg"]),)).batched(16)
    loader = torch.utils.data.DataLoader(
        dataset, None, num_workers=workers, multiprocessing_context="fork" if workers else None
    )
    for batch in loader:
        yield len(batch[0])


if __name__ == "__main__":
    sys.exit(main())
