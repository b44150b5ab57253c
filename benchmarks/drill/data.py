"""The data of a drill: enough short samples that each is read once, made in seconds."""

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from examples.quickstart.tokenizer import train_tokenizer
from megatron_gmai.config import DataConfig
from megatron_gmai.data.loading.dataset import PackDataset, open_dataset
from megatron_gmai.data.prepare import copy_tokenizer
from megatron_gmai.data.shards.build import build_shards
from megatron_gmai.data.text.tokenizer import load_tokenizer
from megatron_gmai.presets import preset

TEXT = "what is shown here the image shows a brain scan of yes no left right lung liver"
WORDS = TEXT.split()
PICTURES = 40
MAX_LENGTH = 128


def make_shards(folder: Path, samples: int, seed: int) -> Path:
    """Samples with and without an image, as shards with a tokenizer."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(PICTURES):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "samples.json").write_text(json.dumps([_record(draw) for _ in range(samples)]))
    entry = {"image_dir": str(folder), "annotations": "samples.json", "sample_ratio": 1.0}
    (folder / "LIST.json").write_text(json.dumps({"samples": entry}))
    train_tokenizer((" ".join(draw.choices(WORDS, k=6)) for _ in range(400)), folder, 340)
    build_shards(folder / "LIST.json", folder / "shards")
    copy_tokenizer(folder / "tokenizer.model", folder / "shards")
    return folder / "shards"


def _record(draw: random.Random) -> dict[str, object]:
    question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(2, 12))) for _ in range(2))
    with_image = draw.random() < 0.5
    turns = [
        {"from": "human", "value": "<image>\n" * with_image + question},
        {"from": "gpt", "value": answer},
    ]
    image = {"image": f"{draw.randrange(PICTURES)}.png"} if with_image else {}
    return {**image, "conversations": turns}


def open_packs(shards: Path, seed: int) -> PackDataset:
    """The stream of packs that a run of the drill trains on."""
    data = DataConfig(shards=str(shards), max_length=MAX_LENGTH)
    vision = preset("gmai-vl-tiny").model.vision
    return open_dataset(data, load_tokenizer(shards), vision, seed, None)


def samples_of(packs: PackDataset, first: int, last: int) -> list[int]:
    """The samples that begin in packs `first` up to `last`."""
    part = packs.plan.packs(first, last)
    return [int(s) for s, start in zip(part.samples, part.starts, strict=True) if start == 0]


def damage(shards: Path, packs: PackDataset, sample: int) -> None:
    """Change a byte of a stored sample."""
    row = packs.shards.rows[sample]
    file = shards / packs.shards.manifest.shards[int(row["shard"])].name
    with file.open("r+b") as tar:
        tar.seek(int(row["offset"]) + int(row["size"]) // 2)
        byte = tar.read(1)
        tar.seek(-1, 1)
        tar.write(bytes([byte[0] ^ 0x10]))
