"""Nothing stale is used: each cached file is bound to all that it was made from."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_gmai.chat_formats import chat_format
from megatron_gmai.data.loading.loader import iterate
from megatron_gmai.data.plan.windows import LENGTH_ROW
from megatron_gmai.data.shards.lengths import token_lengths
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.text.encoder import Encoder
from megatron_gmai.data.text.tokenizer import Tokenizer, load_tokenizer
from tests.data.world import mixed_records, open_list


@pytest.fixture
def list_file(tmp_path: Path, write_list: Callable) -> Path:
    return write_list(A=mixed_records(tmp_path, 12))


def other_tokenizer(file: Path, folder: Path) -> Tokenizer:
    """The same pieces with one more special token."""
    (folder / "tokenizer.model").write_bytes(file.read_bytes())
    config = {"added_tokens_decoder": {"900": {"content": "<|new|>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


CHANGES: dict[str, dict[str, Any]] = {
    "template": {"template": chat_format("qwen")},
    "tokens per image": {"tokens_per_image": 5},
    "length limit": {"max_length": 64},
    "cutting": {"cut": True},
    "images per pack": {"max_images": 1},
}


@pytest.mark.parametrize("name", [*CHANGES, "tokenizer"])
def test_token_lengths_belong_to_one_way_of_encoding(
    list_file: Path, tokenizer_file: Path, tmp_path: Path, name: str
) -> None:
    shards: Shards = open_list(list_file, tokenizer_file).shards
    encoder = Encoder(load_tokenizer(tokenizer_file), chat_format("internlm2"), 4, 128)
    folder = tmp_path / "other"
    folder.mkdir()
    change = CHANGES.get(name) or {"tokenizer": other_tokenizer(tokenizer_file, folder)}
    changed = dataclasses.replace(encoder, **change)
    assert changed.fingerprint != encoder.fingerprint
    before = set(shards.folder.glob("lengths-*.npy"))
    assert len(before) == 1
    token_lengths(shards, encoder)
    assert set(shards.folder.glob("lengths-*.npy")) == before
    token_lengths(shards, changed)
    assert len(set(shards.folder.glob("lengths-*.npy")) - before) == 1


def test_lengths_that_nobody_has_measured_are_refused(
    list_file: Path, tokenizer_file: Path
) -> None:
    """A table that came with a stranger's shards would be packed all the same, without an end."""
    (table,) = open_list(list_file, tokenizer_file).shards.folder.glob("lengths-*.npy")
    sound = np.load(table).astype(LENGTH_ROW)
    for field, value in (
        ("length", 129),
        ("length", -1),
        ("length", 2**31 - 5),
        ("images_end", 128),
    ):
        rows = sound.copy()
        rows[field][0] = value
        np.save(table, rows)
        with pytest.raises(ValueError, match="does not belong to these shards; delete it"):
            open_list(list_file, tokenizer_file)
    # Lengths that might be: what a pack holds of a sample has to be all of it.
    sound["length"], sound["images_end"] = 2, 0
    np.save(table, sound)
    dataset = open_list(list_file, tokenizer_file)
    with pytest.raises(ValueError, match=r"the plan expects 2: delete the lengths-\*.npy"):
        list(iterate(dataset, 0, 1, 1, 1, total_packs=1))
    table.write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match="does not belong to these shards; delete it"):
        open_list(list_file, tokenizer_file)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"max_length": 64},
        {"dset_pack_level": "best-fit"},
        {"group_by_length": True},
        {"max_images_per_pack": 2},
    ],
    ids=str,
)
def test_a_plan_belongs_to_its_settings(
    list_file: Path, tokenizer_file: Path, change: dict[str, Any]
) -> None:
    plain = open_list(list_file, tokenizer_file).fingerprint
    assert open_list(list_file, tokenizer_file).fingerprint == plain
    assert open_list(list_file, tokenizer_file, **change).fingerprint != plain


def test_a_plan_belongs_to_the_ratios_of_the_list(list_file: Path, tokenizer_file: Path) -> None:
    plain = open_list(list_file, tokenizer_file).fingerprint
    entries = json.loads(list_file.read_text())
    entries["A"]["sample_ratio"] = 0.5
    list_file.write_text(json.dumps(entries))
    assert open_list(list_file, tokenizer_file).fingerprint != plain


def test_changed_annotations_give_other_shards_lengths_and_plans(
    list_file: Path, tokenizer_file: Path
) -> None:
    before = open_list(list_file, tokenizer_file).fingerprint
    annotations = list_file.parent / "A.json"
    annotations.write_text(annotations.read_text().replace("yes", "no"))
    assert open_list(list_file, tokenizer_file).fingerprint != before


def test_from_cache_takes_shards_as_they_are_but_measures_for_a_new_template(
    list_file: Path, tokenizer_file: Path
) -> None:
    made = open_list(list_file, tokenizer_file)
    (list_file.parent / "A.json").unlink()
    cached: dict[str, Any] = {"dset_cache_dir": str(made.shards.folder), "dset_from_cache": True}
    again = open_list(list_file, tokenizer_file, **cached)
    assert again.fingerprint == made.fingerprint
    shorter = open_list(list_file, tokenizer_file, max_length=64, **cached)
    assert shorter.fingerprint != made.fingerprint
    assert len(list(made.shards.folder.glob("lengths-*.npy"))) == 2
