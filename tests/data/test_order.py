"""The order of the stream over every layout: the same global batches, nothing lost, nothing twice.

Layouts, worker counts and interruption points are drawn at random from a fixed seed.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_gmai.config import DataConfig
from megatron_gmai.data.loading.dataset import PackDataset, open_dataset
from megatron_gmai.data.loading.loader import iterate
from megatron_gmai.data.prepare import prepare_data
from megatron_gmai.data.text.tokenizer import load_tokenizer
from tests.data.world import VISION, mixed_records, open_list

GLOBAL = 48  # a multiple of every layout below
EPOCHS = 3
RATIO = 1.5
LAYOUTS = [(dp, micro) for dp in (1, 2, 3, 4, 8) for micro in (1, 2)]
RECORDS = 240


@pytest.fixture(scope="module", params=["soft", "best-fit"])
def dataset(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_file: Path,
) -> PackDataset:
    folder = tmp_path_factory.mktemp("order")
    write: Callable = request.getfixturevalue("write_list_in")(folder)
    list_file = write(ratio=RATIO, A=mixed_records(folder, RECORDS))
    return open_list(list_file, tokenizer_file, dset_pack_level=request.param)


def steps(
    dataset: PackDataset, dp: int, micro: int, start: int = 0, workers: int = 0
) -> list[Counter[str]]:
    """Keys of the samples of each global batch."""
    total = dataset.total_packs(EPOCHS)
    found: dict[int, Counter[str]] = {}
    for rank in range(dp):
        batches = iterate(dataset, rank, dp, micro, GLOBAL, start, total, workers, image_share=None)
        for number, batch in enumerate(batches):
            found.setdefault(number * dp * micro // GLOBAL, Counter()).update(batch.keys)
    return [found[step] for step in sorted(found)]


@pytest.fixture(scope="module")
def expected(dataset: PackDataset) -> list[Counter[str]]:
    """By the plan alone, without any loader."""
    total = dataset.total_packs(EPOCHS)
    keys = [dataset.shards.read(row).key for row in range(len(dataset.shards))]
    packs = [dataset.plan.packs(p, min(p + GLOBAL, total)) for p in range(0, total, GLOBAL)]
    return [Counter(keys[sample] for sample in step.samples) for step in packs]


@pytest.mark.parametrize(("dp", "micro"), LAYOUTS)
def test_each_layout_runs_the_planned_global_batches(
    dataset: PackDataset, expected: list[Counter[str]], dp: int, micro: int
) -> None:
    assert len(expected) > 3
    assert steps(dataset, dp, micro) == expected


def test_any_interruption_goes_on_in_any_layout(
    dataset: PackDataset, expected: list[Counter[str]]
) -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        dp, micro = LAYOUTS[generator.integers(len(LAYOUTS))]
        done = int(generator.integers(1, len(expected)))
        assert steps(dataset, dp, micro, start=done * GLOBAL) == expected[done:], (dp, micro, done)


def with_settings(dataset: PackDataset, **settings: Any) -> PackDataset:
    """The same data, opened anew, in another plan."""
    changed = dataclasses.replace(dataset.settings, **settings)
    return PackDataset(
        dataset.shards, dataset.encoder, dataset.vision, dataset.uses, changed, pad_to_square=True
    )


def test_a_bookmark_leads_any_layout_to_the_same_batches(dataset: PackDataset) -> None:
    whole = with_settings(dataset, window=25)
    expected = steps(whole, 1, 1)
    for done, (dp, micro) in zip(range(1, len(expected)), reversed(LAYOUTS), strict=False):
        resumed = with_settings(dataset, window=25)
        resumed.open_at(whole.bookmark(done * GLOBAL))
        assert resumed.plan.epoch_starts == whole.plan.epoch_starts
        assert steps(resumed, dp, micro, start=done * GLOBAL) == expected[done:]


def test_a_bookmark_of_another_plan_is_left_aside(dataset: PackDataset) -> None:
    resumed = with_settings(dataset, window=25)
    resumed.open_at(with_settings(dataset, window=25, seed=2).bookmark(5 * GLOBAL))
    assert resumed.plan.epoch_starts == [0]


def test_a_bookmark_outlives_another_global_batch(
    tmp_path: Path, write_list: Callable, tokenizer_file: Path
) -> None:
    """Only where steps hold like lengths, the plan depends on their size."""
    list_file = write_list(A=mixed_records(tmp_path, 5))
    data = DataConfig(datasets=str(list_file), tokenizer=str(tokenizer_file), max_length=128)
    data = prepare_data(data, VISION, tmp_path / "shards", True, lambda: None)

    def fingerprint(global_batch: int, by_length: bool) -> str:
        settings = dataclasses.replace(data, group_by_length=by_length)
        tokenizer = load_tokenizer(tokenizer_file)
        return open_dataset(settings, tokenizer, VISION, 1, None, global_batch).fingerprint

    assert fingerprint(8, False) == fingerprint(16, False)
    assert fingerprint(8, True) != fingerprint(16, True)


@pytest.mark.parametrize(("dp", "micro", "workers"), [(1, 2, 1), (1, 1, 3), (2, 2, 3)])
def test_workers_change_nothing(
    dataset: PackDataset, expected: list[Counter[str]], dp: int, micro: int, workers: int
) -> None:
    last = len(expected) - 1
    assert steps(dataset, dp, micro, last * GLOBAL, workers) == expected[last:]


def test_the_order_inside_a_rank_is_the_same_with_and_without_workers(
    dataset: PackDataset,
) -> None:
    def keys(workers: int) -> list[tuple[str, ...]]:
        return [b.keys for b in iterate(dataset, 1, 3, 2, GLOBAL, 0, 2 * GLOBAL, workers)]

    assert keys(0) == keys(3)


def test_an_epoch_has_each_sample_as_often_as_its_ratio_says(dataset: PackDataset) -> None:
    first = 0
    for epoch in range(EPOCHS):
        packs = dataset.plan.packs(first, first + dataset.plan.total(epoch))
        counts = Counter(packs.samples.tolist())
        assert len(counts) == RECORDS and sum(counts.values()) == RATIO * RECORDS
        assert set(counts.values()) == {1, 2}
        first += dataset.plan.total(epoch)
