"""Figures of scoring and of the search for leakage: `python benchmarks/evaluation.py`.

Writes runs/bench/evaluation.json. Exits with 1 if a bar is missed: 100 thousand predictions scored
by all protocols, and 10 thousand images hashed and compared with a million, in a minute each.
"""

import argparse
import csv
import io
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from kernel_figures import Figure, at_most, show, write
from PIL import Image

from megatron_gmai.evaluate.benchmarks.predictions import read_predictions
from megatron_gmai.evaluate.benchmarks.table import read_benchmark
from megatron_gmai.evaluate.leakage.compare import Finder
from megatron_gmai.evaluate.leakage.hashes import HASHED, WORDS, hash_image
from megatron_gmai.evaluate.protocols.registry import PROTOCOLS
from megatron_gmai.evaluate.report import Scores
from megatron_gmai.evaluate.scores import join, judge_all

BAR_S = 60.0
MODALITIES = ("CT", "MR", "X-ray", "ultrasound", "PET", "fundus photography", "histology")
FINDINGS = (
    "a mass in the left lung",
    "no abnormality",
    "pleural effusion",
    "a fracture of the rib",
)
PHRASES = (
    "{}",
    "{}.",
    "The answer is {}",
    "The image shows {}, because of the signal.",
    "I see {}",
)


def main() -> int:
    """Returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--predictions", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--hashes", type=int, default=1_000_000)
    parser.add_argument("--output", default="runs/bench/evaluation.json")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = list(score_figures(Path(folder), flags.predictions))
    figures += leakage_figures(flags.images, flags.hashes)
    show(figures)
    write(Path(flags.output), figures, [])
    return int(any(figure.holds is False for figure in figures))


def score_figures(folder: Path, count: int) -> Iterator[Figure]:
    """All protocols on predictions of every kind, from files to the rows of the result."""
    table, predictions = folder / "Set.tsv", folder / "model_Set.tsv"
    write_questions(table, predictions, count)
    begun, begun_cpu = time.perf_counter(), time.process_time()
    benchmark = read_benchmark(table)
    answered = join(benchmark, read_predictions(predictions))
    verdicts = {
        name: judge_all(protocol, benchmark, answered) for name, protocol in PROTOCOLS.items()
    }
    Scores(benchmark, predictions, verdicts).to_json()
    seconds = time.perf_counter() - begun
    cpu = time.process_time() - begun_cpu
    name = f"{count:,} predictions by {len(PROTOCOLS)} protocols"
    yield at_most(f"{name}, processor", cpu, "s", BAR_S)
    yield Figure(f"{name}, clock", seconds, "s")


def write_questions(table: Path, predictions: Path, count: int) -> None:
    """60 % multiple choice, 20 % yes/no, 20 % open; four questions an image, which is named."""
    rng = random.Random(0)
    names = ["index", "image_path", "question", *"ABCD", "answer", "modality", "category"]
    with (
        table.open("w", encoding="utf-8", newline="") as questions,
        predictions.open("w", encoding="utf-8", newline="") as answers,
    ):
        rows, said = (csv.writer(file, delimiter="\t") for file in (questions, answers))
        rows.writerow(names)
        said.writerow(["index", "prediction"])
        for index in range(count):
            options, truth, text = question(rng, index)
            image, modality = f"{index // 4}.png", rng.choice(MODALITIES)
            category = f"set {rng.randrange(40)}"
            rows.writerow([index, image, f"q{index}", *options, truth, modality, category])
            said.writerow([index, rng.choice(PHRASES).format(text)])


def question(rng: random.Random, index: int) -> tuple[list[str], str, str]:
    """Options, truth, and what is said."""
    if index % 5 < 3:
        options = rng.sample(MODALITIES, 4)
        position = rng.randrange(4)
        return options, "ABCD"[position], rng.choice(["ABCD"[rng.randrange(4)], options[position]])
    if index % 5 == 3:
        return [""] * 4, rng.choice(["yes", "no"]), rng.choice(["yes", "no", "normal"])
    return [""] * 4, rng.choice(FINDINGS), rng.choice(FINDINGS)


def leakage_figures(images: int, hashes: int) -> list[Figure]:
    """Decoding and hashing the images, then comparing; the large side is in its file already."""
    rng = np.random.default_rng(0)
    training = np.zeros(hashes, HASHED)
    training["looks"] = rng.integers(0, 2**64, (hashes, WORDS), dtype=np.uint64)
    training["exact"] = rng.integers(0, 2**64, (hashes, 2), dtype=np.uint64)
    files = [picture(rng) for _ in range(64)]
    begun, begun_cpu = time.perf_counter(), time.process_time()
    both = [hash_image(files[position % len(files)]) for position in range(images)]
    hashed = time.perf_counter()
    exact, looks = (np.stack([one[part] for one in both]) for part in (0, 1))
    Finder(exact, looks, 15).find(training)
    done = time.perf_counter()
    cpu = time.process_time() - begun_cpu
    name = f"{images:,} images against {hashes:,} hashes"
    return [
        at_most(f"{name}, processor", cpu, "s", BAR_S),
        Figure(f"{name}, clock", done - begun, "s"),
        Figure("of it comparing, clock", done - hashed, "s"),
    ]


def picture(rng: np.random.Generator, side: int = 256) -> bytes:
    """A JPEG file of smooth noise."""
    small = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
