"""Figures of the data pipeline, side by side in one run: `python benchmarks/data.py`.

Writes runs/bench/data.json. Every comparison is a ratio of two things measured in this run on this
machine: throughput to packed batches against the plain ways to load the same images, the fill of
packs, the evenness of the work of data-parallel ranks, and planning at the size of a large index.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import simplejpeg
import torch
import webdataset
from PIL import Image

from megatron_gmai.config import DataConfig, VisionConfig
from megatron_gmai.data.balance import assign, pack_costs
from megatron_gmai.data.dataset import PackDataset, open_dataset
from megatron_gmai.data.lengths import LENGTH_ROW
from megatron_gmai.data.loader import iterate
from megatron_gmai.data.packing import pack_best_fit, pack_none, pack_soft
from megatron_gmai.data.plan import Plan, PlanSettings
from megatron_gmai.data.prepare import prepare_data
from megatron_gmai.data.tokenizer import load_tokenizer

SIDE = 336
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
TEXT = "the image shows a region of bright tissue with a dark border on the left side"
WORDS = TEXT.split()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--samples", type=int, default=14_000_000, help="of the synthetic index")
    parser.add_argument("--output", default="runs/bench/data.json")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"fill": fill(), "evenness": evenness()}
    figures["planning"] = [planning(100_000), planning(flags.samples)]
    with tempfile.TemporaryDirectory() as folder:
        figures["throughput"] = throughput(Path(folder), flags.images)
    output = Path(flags.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return 0


def length_mix(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and images of the usual mix: three quarters of the samples have an image (576 tokens
    and lognormal text of mean 150), the others are text (lognormal of mean 300)."""
    generator = np.random.default_rng(0)
    images = (generator.random(count) < 0.75).astype(np.int64)
    mean = np.where(images == 1, 150.0, 300.0)
    text = np.exp(generator.normal(np.log(mean) - 0.18, 0.6))
    return (576 * images + text).astype(np.int64).clip(8, 2048), images


def fill() -> dict[str, dict[str, float]]:
    """Share of the tokens of all packs that belong to samples."""
    lengths, _ = length_mix(100_000)
    result = {}
    for limit in (2048, 4096):
        packs = {
            "none": pack_none(lengths),
            "soft": pack_soft(lengths, limit),
            "best-fit": pack_best_fit(lengths[:32_768], limit),
        }
        result[str(limit)] = {
            name: float((p.stops - p.starts).sum() / (limit * len(p))) for name, p in packs.items()
        }
    return result


def evenness(dp: int = 8, step: int = 512) -> dict[str, float]:
    """Most over mean work of a rank: over whole steps, and at one time with one pack per rank."""
    lengths, images = length_mix(65_536)
    packs = pack_best_fit(lengths, 2048)
    packs = packs.reordered(np.random.default_rng(1).permutation(len(packs)))
    ratios: dict[str, list[float]] = {}
    for start in range(0, len(packs) - step, step):
        costs = pack_costs(packs.part(start, start + step), images)
        order = assign(costs[0], costs[1], dp, 1)
        for name, cost in zip(("images", "attention"), costs, strict=True):
            whole, single = cost[order].sum(axis=(0, 2)), cost[order].sum(axis=2)
            ratios.setdefault(f"{name}_step", []).append(whole.max() / whole.mean())
            at_once = single.max(axis=1) / np.maximum(single.mean(axis=1), 1e-9)
            ratios.setdefault(f"{name}_at_one_time", []).append(at_once.mean())
    return {name: float(np.mean(values)) for name, values in ratios.items()}


def planning(samples: int) -> dict[str, float]:
    """Seconds for the pieces of work that a start in mid-run needs."""
    lengths = np.zeros(samples, dtype=LENGTH_ROW)
    lengths["length"], _ = length_mix(samples)
    shards = samples // 1000
    sources = np.sort(np.random.default_rng(0).integers(0, 20, shards))
    settings = PlanSettings(1, 2048, "best-fit")
    plan = Plan(lengths, np.arange(shards + 1) * 1000, sources, [1.0] * 20, settings)
    total, epoch_s = timed(lambda: plan.total(0))
    _, first_s = timed(lambda: plan.packs(total // 2, total // 2 + 512))
    steps = range(total // 2, min(total // 2 + 50 * 512, total - 512), 512)
    _, steps_s = timed(lambda: [plan.packs(start, start + 512) for start in steps])
    return {
        "samples": samples,
        "samples_per_s": samples / epoch_s,
        "first_step_s": first_s,
        "later_step_s": steps_s / len(steps),
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def throughput(folder: Path, count: int) -> dict[str, Any]:
    """Images per second to a batch, with 0 and 2 worker processes."""
    dataset = make_data(folder, count)
    names = sorted(str(path) for path in folder.glob("*.jpg"))
    files = [Path(name).read_bytes() for name in names]
    (tar,) = (folder / "shards").glob("*.tar")
    _, seconds = timed(lambda: [simplejpeg.decode_jpeg(f, "RGB", False, False) for f in files])
    result: dict[str, Any] = {"jpeg_decode_limit_per_core": count / seconds}
    for workers in (0, 2):
        speeds = {
            "ours": speed(ours(dataset, workers)),
            "json_and_pillow": speed(plain(folder, workers)),
            "webdataset": speed(stream(tar, workers)),
        }
        result[f"{workers}_workers"] = {
            **speeds,
            "over_json_and_pillow": speeds["ours"] / speeds["json_and_pillow"],
            "over_webdataset": speeds["ours"] / speeds["webdataset"],
            "of_decode_limit": speeds["ours"]
            / (result["jpeg_decode_limit_per_core"] * max(workers, 1)),
        }
    return result


def speed(batches: Iterator[int]) -> float:
    """Images per second, from the first batch on: starting processes is not the subject."""
    next(batches)
    begin = time.perf_counter()
    seen = sum(batches)
    return seen / (time.perf_counter() - begin)


def make_data(folder: Path, count: int) -> PackDataset:
    """Smooth 512 x 384 JPEGs, one question each, as shards."""
    generator = np.random.default_rng(0)
    records = []
    for number in range(count):
        coarse = generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((512, 384), Image.Resampling.BICUBIC)
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
    vision = VisionConfig()
    data = prepare_data(data, vision, folder / "shards", True, lambda: None)
    return open_dataset(data, load_tokenizer(str(data.tokenizer)), vision, 1, None)


def ours(dataset: PackDataset, workers: int) -> Iterator[int]:
    total = dataset.total_packs(4)
    for batch in iterate(dataset, 0, 1, 5, 5, 0, total, num_workers=workers):
        yield len(batch.pixel_values)


def plain(folder: Path, workers: int) -> Iterator[int]:
    """A JSON list, Pillow and a float normalisation."""
    records = json.loads((folder / "data.json").read_text()) * 4
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
    repeats = 4 // max(workers, 1)
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
