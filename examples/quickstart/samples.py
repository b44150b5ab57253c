"""Samples in GMAI-VL's format: crops with their questions, text-only samples and image pairs.

A sample of the quick start has two keys beside GMAI-VL's own, for the report: `question_type`
(of its last question) and `class`.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples.quickstart import questions as q
from examples.quickstart.crops import HELD_OUT, KINDS, TRAIN, Crop, crops, resize

Sample = dict[str, Any]

SEED = 2411
SEVERAL = "several"  # the class of a sample with images of several classes
REPORT_KEYS = ("question_type", "class")
# How often each type is asked; a kind's own detail counts as often as multiple choice.
_TRAIN_TYPES = ("modality", "organ", "yes_no", "multiple_choice", "multiple_choice", "caption")
_HELD_OUT_TYPES = (
    *["modality"] * 9,
    *["organ"] * 9,
    *["multiple_choice"] * 10,
    *["caption"] * 6,
    *["yes_no"] * 4,
)
_HELD_OUT_DETAILS = 6  # asked of the first crops; of kinds without a detail: the modality
# Grey sources of more than 8 bits: some of their crops become 16-bit PNG. Not the CT: readers
# stretch deep images to their own range, and its display window is asked for.
_DEEP_KINDS = ("chest_xray",)

_DETAIL_OF = {
    "brain_mr": "plane",
    "echo": "probe",
    "abdominal_ct": "window",
    "chest_xray": "zone",
    "colon_histology": "stain",
    "nuclei": "channel",
}
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class AskedCrop:
    """A crop and the questions asked of it."""

    crop: Crop
    questions: tuple[q.Question, ...]


def asked_crops(kind: str, split: str, count: int) -> Iterator[AskedCrop]:
    """`count` crops with their questions, each detail value equally often."""
    rng = np.random.default_rng([SEED, KINDS.index(kind), split == HELD_OUT, 1])
    for index, crop in enumerate(_balanced(kind, split, count)):
        types = _held_out_types(crop, index) if split == HELD_OUT else _train_types(crop, rng)
        yield AskedCrop(crop, tuple(q.ask(name, crop, rng) for name in types))


def image_sample(output: Path, split: str, index: int, asked: AskedCrop) -> Sample:
    """Saves the image below `output` and returns its sample."""
    crop = asked.crop
    rng = np.random.default_rng([SEED, KINDS.index(crop.kind), split == HELD_OUT, 4, index])
    name = f"{crop.kind}_{split}_{index:04d}"
    pixels = resize(crop.pixels, int(rng.integers(112, 161)))
    if split == TRAIN:
        pixels = _exposed_otherwise(pixels, rng)
    path = _save(output / "images", name, pixels, crop.kind, index)
    height, width = pixels.shape[:2]
    return {
        "id": name,
        "image": f"images/{path.name}",
        "width": width,
        "height": height,
        **_conversation(asked.questions, images=1),
        "question_type": asked.questions[-1].kind,
        "class": crop.kind,
    }


def pairs(samples: Sequence[Sample], split: str, count: int) -> list[Sample]:
    """`count` samples of two images each, drawn from samples of one image."""
    rng = np.random.default_rng([SEED, split == HELD_OUT, 2])
    made = []
    for index in range(count):
        first, second = (samples[int(i)] for i in rng.choice(len(samples), 2, replace=False))
        question = q.pair(first["class"], second["class"])
        made.append(
            {
                "id": f"pair_{split}_{index:04d}",
                "image": [first["image"], second["image"]],
                "width": [first["width"], second["width"]],
                "height": [first["height"], second["height"]],
                **_conversation((question,), images=2),
                "question_type": "pair",
                "class": SEVERAL,
            }
        )
    return made


def text_samples(count: int) -> Iterator[Sample]:
    """Samples without an image."""
    rng = np.random.default_rng([SEED, 3])
    for index in range(count):
        asked = tuple(q.text_only(index, rng))
        yield {"id": f"text_{index:04d}", **_conversation(asked, images=0)}


def _balanced(kind: str, split: str, count: int) -> Iterator[Crop]:
    """Crops in which the values of the kind's detail take turns."""
    waiting: dict[str, list[Crop]] = defaultdict(list)
    stream = crops(kind, split, SEED)
    values = q.DETAILS[_DETAIL_OF[kind]][1] if kind in _DETAIL_OF else ("",)
    for index in range(count):
        wanted = values[index % len(values)]
        while not waiting[wanted]:
            crop = next(stream)
            waiting[next(iter(crop.details.values()), "")].append(crop)
        yield waiting[wanted].pop(0)


def _train_types(crop: Crop, rng: np.random.Generator) -> tuple[str, ...]:
    """One to three types, most often three: questions are cheap beside the image's tokens."""
    pool = [*_TRAIN_TYPES, *(name for name in crop.details for _ in range(2))]
    count = int(rng.choice([1, 2, 3, 3]))
    return tuple(dict.fromkeys(str(name) for name in rng.permutation(pool)[:count]))


def _held_out_types(crop: Crop, index: int) -> tuple[str, ...]:
    """One type. Crops come with the detail's values in turn, so neighbours differ in it."""
    if index < _HELD_OUT_DETAILS:
        return (next(iter(crop.details), "modality"),)
    return (_HELD_OUT_TYPES[(index - _HELD_OUT_DETAILS) % len(_HELD_OUT_TYPES)],)


def _conversation(asked: tuple[q.Question, ...], images: int) -> Sample:
    turns = []
    for number, question in enumerate(asked):
        prefix = "<image>\n" * images if number == 0 else ""
        turns.append({"from": "human", "value": prefix + question.prompt})
        turns.append({"from": "gpt", "value": question.answer})
    return {"conversations": turns}


def _save(folder: Path, name: str, pixels: np.ndarray, kind: str, index: int) -> Path:
    """JPEG mostly; every fifth PNG, 16 bits deep where the source is."""
    if index % 5 == 0 and kind in _DEEP_KINDS:
        path = folder / f"{name}.png"
        Image.fromarray(np.round(pixels * 65535).astype(np.uint16)).save(path)
        return path
    image = Image.fromarray(np.round(pixels * 255).astype(np.uint8))
    path = folder / (f"{name}.png" if index % 5 == 0 else f"{name}.jpg")
    image.save(path, quality=_JPEG_QUALITY)  # PNG has no quality and ignores it
    return path


def _exposed_otherwise(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and noise vary, so that a network cannot learn pixels by heart."""
    varied = pixels ** rng.uniform(0.75, 1.35) * rng.uniform(0.85, 1.15)
    varied = varied + rng.normal(0, rng.uniform(0, 0.04), pixels.shape)
    return np.clip(varied, 0, 1)
