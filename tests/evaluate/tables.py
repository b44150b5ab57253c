"""Small benchmarks for tests, and questions without a file."""

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_gmai.evaluate.benchmarks.table import Item

OPTIONS = {"A": "CT", "B": "MRI", "C": "X-ray", "D": "PET"}


def item(
    answer: str,
    options: Mapping[str, str] | None = None,
    index: str = "0",
    image: str = "an image",
    **columns: str,
) -> Item:
    return Item(index, "What is shown?", answer, dict(options or {}), "", image, columns, (0, 0))


def png(seed: int = 0, size: int = 48) -> bytes:
    """Noise with the spectrum of photographs: every seed is another picture, also to a perceptual
    hash."""
    noise = np.fft.fft2(np.random.default_rng(seed).normal(size=(size, size)))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    picture = np.fft.ifft2(noise / (frequency + 1 / size)).real
    low, high = np.percentile(picture, (1, 99))
    levels = np.clip((picture - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    return encoded(Image.fromarray(levels))


def encoded(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def cell(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write_tsv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names, delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return path


def choices(count: int, images: int = 4, **columns: str) -> list[dict[str, object]]:
    """Rows of `count` questions about `images` pictures; the right option goes round."""
    rows: list[dict[str, object]] = []
    for number in range(count):
        picture = number % images
        rows.append(
            {
                "index": number,
                "image": cell(png(picture)) if number < images else str(picture),
                "question": f"Which modality is number {number}?",
                **OPTIONS,
                "answer": "ABCD"[number % 4],
                **columns,
            }
        )
    return rows
