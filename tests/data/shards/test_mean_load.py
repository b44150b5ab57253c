"""The means that a plan is made with are those of the packs that a run trains on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_gmai.config import DataConfig
from megatron_gmai.data.plan.balance import pack_costs
from megatron_gmai.data.shards.mean_load import pack_means
from tests.data.world import mixed_records, open_list


def test_means_are_those_of_the_plan(
    tmp_path: Path, write_list: Callable, tokenizer_file: Path
) -> None:
    dataset = open_list(write_list(A=mixed_records(tmp_path, 40)), tokenizer_file, seed=0)
    count = dataset.total_packs(1)
    packs = dataset.plan.packs(0, count)
    images, _ = pack_costs(packs, dataset.shards.rows["images"])
    level = dataset.settings.pack_level
    means = pack_means(dataset.shards.folder, DataConfig(max_length=128, dset_pack_level=level))
    assert means.images == pytest.approx(images.sum() / count)
    assert means.samples == pytest.approx(40 / count)
    assert means.fill == pytest.approx((packs.stops - packs.starts).sum() / (128 * count))
    assert means.epoch_samples == 40
