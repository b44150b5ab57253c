"""A small world of data for the tests: pictures, annotations, an open data set."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_gmai.config import DataConfig, VisionConfig
from megatron_gmai.data.loading.dataset import PackDataset, open_dataset
from megatron_gmai.data.prepare import prepare_data
from megatron_gmai.data.text.tokenizer import load_tokenizer

TEXT = "what is shown here the image shows a brain scan of yes no left right lung liver"
WORDS = TEXT.split()
# Two patches a side: four tokens an image.
VISION = VisionConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    ffn_hidden_size=32,
    patch_size=14,
    image_size=28,
)


def picture(width: int = 20, height: int = 14, seed: int = 0) -> Image.Image:
    """A reproducible RGB picture."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def record(question: str, answer: str, image: Any = None, **more: Any) -> dict[str, Any]:
    """One annotation in GMAI-VL's format."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**({} if image is None else {"image": image}), "conversations": turns, **more}


def mixed_records(folder: Path, count: int) -> list[dict[str, Any]]:
    """Image, two-image, multi-turn and text-only samples of differing length; writes the images."""
    records = []
    for i in range(count):
        picture(seed=i).save(folder / f"{i}.png")
        words = " ".join(WORDS[: 1 + i % len(WORDS)])
        kinds = [
            record(f"<image>\n{words}", words, f"{i}.png", id=f"one-{i}"),
            record(words, f"{words} {words}", id=f"text-{i}"),
            record(f"<image><image>{words}", "yes", [f"{i}.png", f"{i}.png"], id=f"two-{i}"),
        ]
        chosen = kinds[i % 3]
        if i % 5 == 0:
            chosen["conversations"] += record(words, "no")["conversations"]
        records.append(chosen)
    return records


def open_list(
    list_file: Path, tokenizer_file: Path, rejected: Path | None = None, **settings: Any
) -> PackDataset:
    """The data set of a list file, its shards made beside it on first use."""
    seed = settings.pop("seed", 1)
    settings = {"max_length": 128, "max_rejected": 0.9, **settings}
    data = DataConfig(datasets=str(list_file), tokenizer=str(tokenizer_file), **settings)
    data = prepare_data(data, VISION, list_file.parent / "shards")
    return open_dataset(data, load_tokenizer(tokenizer_file), VISION, seed, rejected)
