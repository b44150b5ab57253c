"""Builds the quick start's data set: `python -m examples.quickstart.build --output DIR`.

    DIR/quickstart.json    list file for training (GMAI-VL's format, paths relative to DIR)
    DIR/held_out.json      samples with the keys `question_type` and `class`
    DIR/brain_mr.json ...  annotations: one file per class, pairs.json, text_only.jsonl
    DIR/images/            JPEG, PNG and 16-bit PNG
    DIR/tokenizer.model    sentencepiece
    DIR/data_set.json      counts, guess accuracy, and where each crop was cut

The same bytes on every run with the same package versions.
"""

import argparse
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.quickstart.crops import HELD_OUT, KINDS, TRAIN, Crop
from examples.quickstart.samples import (
    REPORT_KEYS,
    Sample,
    asked_crops,
    image_sample,
    pairs,
    text_samples,
)
from examples.quickstart.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Sizes:
    """Samples to make: of each class, with text alone, and with two images."""

    train: int = 700
    held_out: int = 48
    text: int = 320
    train_pairs: int = 240
    held_out_pairs: int = 24


@dataclass(frozen=True)
class DataSet:
    """What `build` wrote."""

    list_file: Path
    held_out: Path
    tokenizer: Path
    guess_accuracy: float


def build(output: Path, sizes: Sizes | None = None) -> DataSet:
    """Write the data set into `output` (made if missing), over an earlier one; return its paths.

    Raises:
        ValueError: an image package is missing; the message names it.
    """
    sizes = sizes or Sizes()
    shutil.rmtree(output / "images", ignore_errors=True)
    (output / "images").mkdir(parents=True)
    train, held_out = {}, []
    cut_out: list[dict[str, Any]] = []
    for kind in KINDS:
        train[kind] = _image_samples(output, kind, TRAIN, sizes.train, cut_out)
        held_out += _image_samples(output, kind, HELD_OUT, sizes.held_out, cut_out)
    with_images = [sample for made in train.values() for sample in made]
    train["pairs"] = pairs(with_images, TRAIN, sizes.train_pairs)
    held_out += pairs(held_out, HELD_OUT, sizes.held_out_pairs)
    train["text_only"] = list(text_samples(sizes.text))
    _write_lists(output, train)
    _dump(output / "held_out.json", held_out)
    guesses = guess_accuracy(held_out)
    _dump(output / "data_set.json", _about(train, held_out, guesses, cut_out))
    train_tokenizer(_text([*with_images, *train["text_only"], *train["pairs"]]), output)
    return DataSet(
        output / "quickstart.json",
        output / "held_out.json",
        output / "tokenizer.model",
        guesses["overall"],
    )


def guess_accuracy(samples: Sequence[Sample]) -> dict[str, float]:
    """Accuracy of always giving the commonest answer of each question type, and `overall`."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        answers[sample["question_type"]][sample["conversations"][-1]["value"]] += 1
    hits = {name: counts.most_common(1)[0][1] for name, counts in answers.items()}
    by_type = {name: hits[name] / answers[name].total() for name in sorted(answers)}
    return {"overall": sum(hits.values()) / len(samples), **by_type}


def _image_samples(
    output: Path, kind: str, split: str, count: int, cut_out: list[dict[str, Any]]
) -> list[Sample]:
    """Writes the images, and appends where each was cut to `places`."""
    made = []
    for index, asked in enumerate(asked_crops(kind, split, count)):
        made.append(image_sample(output, split, index, asked))
        cut_out.append(_cut_out_of(made[-1], split, asked.crop))
    return made


def _cut_out_of(sample: Sample, split: str, crop: Crop) -> dict[str, Any]:
    region = {"section": crop.section, "box": crop.box}
    return {"image": sample["image"], "class": crop.kind, "split": split, **region}


def _write_lists(output: Path, train: dict[str, list[Sample]]) -> None:
    """The annotation files (text alone as JSON Lines) and the list file that names them."""
    entries = {}
    for name, made in train.items():
        samples = [{k: v for k, v in s.items() if k not in REPORT_KEYS} for s in made]
        text_only = name == "text_only"
        path = output / (f"{name}.jsonl" if text_only else f"{name}.json")
        if text_only:
            path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        else:
            _dump(path, samples)
        entries[name] = {
            "image_dir": "",
            "annotations": path.name,
            "sample_ratio": 0.5 if text_only else 1.0,
            "length": len(samples),
            "data_augment": False,
        }
    _dump(output / "quickstart.json", entries)


def _about(
    train: dict[str, list[Sample]],
    held_out: list[Sample],
    guesses: dict[str, float],
    cut_out: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "train_questions": {name: _questions(made) for name, made in train.items()},
        "held_out_questions": Counter(sample["class"] for sample in held_out),
        "guess_accuracy": guesses,
        "crops": cut_out,
    }


def _questions(samples: Sequence[Sample]) -> int:
    return sum(len(sample["conversations"]) // 2 for sample in samples)


def _text(samples: Sequence[Sample]) -> set[str]:
    """Every line that the chat template can hold, once."""
    values = {turn["value"] for sample in samples for turn in sample["conversations"]}
    lines = {line for value in values for line in value.split("\n") if line not in ("", "<image>")}
    return lines | {"system", "user", "assistant"}


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart/data"))
    made = build(parser.parse_args().output)
    print(f"{made.list_file}: guessing scores {made.guess_accuracy:.3f} on {made.held_out}")


if __name__ == "__main__":
    main()
