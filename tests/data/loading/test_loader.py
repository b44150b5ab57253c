"""Micro-batches: exact segments, and the same global batches in any layout, from any point."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_gmai.config import IGNORE_INDEX
from megatron_gmai.data.images.decode import load_image
from megatron_gmai.data.loading.batch import MicroBatch
from megatron_gmai.data.loading.dataset import PackDataset
from megatron_gmai.data.loading.loader import iterate
from megatron_gmai.layout import ImageShare
from tests.data.world import VISION, mixed_records, open_list, record

GLOBAL = 12


@pytest.fixture
def dataset(tmp_path: Path, write_list: Callable, tokenizer_file: Path) -> PackDataset:
    list_file = write_list(A=mixed_records(tmp_path, 40), B=mixed_records(tmp_path, 20))
    return open_list(list_file, tokenizer_file)


def segments(batch: MicroBatch) -> Iterator[slice]:
    bounds = batch.cu_seqlens.tolist()
    return (slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True))


def test_shapes_and_types(dataset: PackDataset) -> None:
    batch = next(iterate(dataset, 0, 1, 2, GLOBAL))
    total = 2 * 128
    for tensor in (batch.tokens, batch.labels, batch.position_ids):
        assert tensor.shape == (total,) and tensor.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == total
    assert 128 in batch.cu_seqlens
    assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
    images = len(batch.image_starts)
    assert batch.pixel_values.shape == (images, 3, 28, 28)
    assert batch.pixel_values.dtype == torch.uint8


def test_segments_hold_whole_samples_and_predict_only_their_own_tokens(
    dataset: PackDataset,
) -> None:
    tokenizer = dataset.encoder.tokenizer
    for batch in iterate(dataset, 0, 1, 2, GLOBAL, total_packs=dataset.total_packs(1)):
        found = 0
        for segment in segments(batch):
            tokens, labels = batch.tokens[segment], batch.labels[segment]
            assert batch.position_ids[segment].tolist() == list(range(len(tokens)))
            assert labels[-1] == IGNORE_INDEX
            supervised = labels[:-1] != IGNORE_INDEX
            assert torch.equal(labels[:-1][supervised], tokens[1:][supervised])
            if supervised.any():
                found += 1
                text = tokenizer.decode(tokens.tolist())
                assert text.startswith("<|im_start|>user") and text.endswith("<|im_end|>\n")
            else:
                assert (tokens == tokenizer.pad_id).all()
        assert found == batch.num_samples == len(batch.keys)
        assert batch.num_tokens == int((batch.tokens != tokenizer.pad_id).sum())


def test_images_stand_at_their_placeholders(dataset: PackDataset) -> None:
    count = VISION.tokens_per_image
    image_id = dataset.encoder.tokenizer.image_token_id
    for batch in iterate(dataset, 0, 1, 2, GLOBAL, total_packs=dataset.total_packs(1)):
        places = {s + i for s in batch.image_starts.tolist() for i in range(count)}
        assert places == set((batch.tokens == image_id).nonzero().flatten().tolist())


def test_each_sample_gets_its_own_images(dataset: PackDataset) -> None:
    stored = {s.key: s for s in map(dataset.shards.read, range(len(dataset.shards)))}
    for batch in iterate(dataset, 0, 1, 2, GLOBAL, total_packs=dataset.total_packs(1)):
        files = [data for key in batch.keys for data in stored[key].images]
        expected = [load_image(data, VISION.image_size) for data in files]
        assert np.array_equal(batch.pixel_values.numpy(), np.array(expected).reshape(-1, 3, 28, 28))


def global_batches(
    dataset: PackDataset, dp: int, micro: int, start: int = 0, **options
) -> list[list[str]]:
    """Sorted keys of each step, over all ranks."""
    total = dataset.total_packs(2)
    steps: dict[int, list[str]] = {}
    for rank in range(dp):
        batches = iterate(dataset, rank, dp, micro, GLOBAL, start, total, **options)
        for number, batch in enumerate(batches):
            steps.setdefault(number // (GLOBAL // (dp * micro)), []).extend(batch.keys)
    return [sorted(steps[step]) for step in sorted(steps)]


@pytest.mark.parametrize(("dp", "micro"), [(1, 2), (2, 1), (3, 1), (2, 3), (4, 1), (12, 1)])
def test_global_batches_do_not_depend_on_the_layout(
    dataset: PackDataset, dp: int, micro: int
) -> None:
    assert global_batches(dataset, dp, micro) == global_batches(dataset, 1, 1)


@pytest.mark.parametrize("done", [1, 2, 3])
def test_an_interrupted_run_goes_on_with_the_same_global_batches(
    dataset: PackDataset, done: int
) -> None:
    whole = global_batches(dataset, 1, 1)
    assert global_batches(dataset, 2, 1, start=done * GLOBAL) == whole[done:]


def test_starting_draws_none_of_the_runs_random_numbers(dataset: PackDataset) -> None:
    """A run that is resumed starts its loader once more than one that is not."""
    before = torch.get_rng_state()
    next(iterate(dataset, 0, 1, 2, GLOBAL))
    assert torch.equal(torch.get_rng_state(), before)


def test_two_epochs_hold_each_sample_twice(dataset: PackDataset) -> None:
    keys = sorted(key for step in global_batches(dataset, 2, 1) for key in step)
    stored = sorted(dataset.shards.read(i).key for i in range(len(dataset.shards)))
    assert keys == sorted(stored + stored)


def test_the_last_step_is_filled_up_with_empty_packs(dataset: PackDataset) -> None:
    total = dataset.total_packs(1)
    batches = list(iterate(dataset, 0, 1, 1, GLOBAL, total_packs=total))
    assert len(batches) == -(-total // GLOBAL) * GLOBAL
    for batch in batches[total:]:
        assert batch.num_samples == 0 and len(batch.pixel_values) == 0
        assert (batch.labels == IGNORE_INDEX).all()
        assert batch.cu_seqlens.tolist() == [0, 128]


def test_a_part_of_an_epoch_is_a_part_of_its_packs(dataset: PackDataset) -> None:
    whole = dataset.total_packs(1)
    assert whole == dataset.plan.total(0)
    assert dataset.total_packs(0.5) == -(-whole // 2)
    assert dataset.total_packs(1.5) > whole


def test_without_pixels_everything_else_is_the_same(dataset: PackDataset) -> None:
    with_pixels = next(iterate(dataset, 0, 1, 2, GLOBAL))
    without = next(iterate(dataset, 0, 1, 2, GLOBAL, image_share=None))
    assert len(without.pixel_values) == 0
    assert torch.equal(without.image_starts, with_pixels.image_starts)
    assert torch.equal(without.tokens, with_pixels.tokens)


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_the_shares_of_a_group_make_up_the_images(dataset: PackDataset, parts: int) -> None:
    whole = next(iterate(dataset, 0, 1, 4, GLOBAL))
    total = torch.zeros_like(whole.pixel_values)
    for part in range(parts):
        share = next(iterate(dataset, 0, 1, 4, GLOBAL, image_share=ImageShare(part, parts)))
        own = slice(part, None, parts)
        assert torch.equal(share.pixel_values[own], whole.pixel_values[own])
        total += share.pixel_values
    assert torch.equal(total, whole.pixel_values)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_micro_batch_says_how_many_images_of_its_step_come_before_it(
    dataset: PackDataset, workers: int
) -> None:
    share, steps = ImageShare(1, 2), 2
    stream = iterate(dataset, 0, 2, 1, GLOBAL, num_workers=workers, image_share=share)
    for _ in range(steps):
        dealt = 0
        for batch in itertools.islice(stream, GLOBAL // 2):
            assert batch.first_image == dealt
            decoded = [i for i, image in enumerate(batch.pixel_values) if image.any()]
            assert decoded == list(share.after(dealt).own(len(batch.image_starts)))
            dealt += len(batch.image_starts)
        assert dealt > 1


def test_no_pack_has_more_images_than_allowed(
    tmp_path: Path, write_list: Callable, tokenizer_file: Path
) -> None:
    list_file = write_list(A=mixed_records(tmp_path, 40))

    def images(**settings) -> list[int]:
        dataset = open_list(list_file, tokenizer_file, **settings)
        total = dataset.total_packs(1)
        return [len(b.image_starts) for b in iterate(dataset, 0, 1, 1, 1, total_packs=total)]

    free = images()
    for level in ("soft", "hard", "best-fit"):
        capped = images(max_images_per_pack=2, dset_pack_level=level)
        assert max(capped) == 2 < max(free) and sum(capped) == sum(free)
    alone = images(max_images_per_pack=1)
    assert max(alone) == 1 and sum(alone) == sum(i % 3 == 0 for i in range(40))


def test_sizes_that_do_not_divide_are_refused(dataset: PackDataset) -> None:
    with pytest.raises(ValueError, match="--global-batch-size 12 .* 5 data-parallel ranks"):
        next(iterate(dataset, 0, 5, 1, GLOBAL))


def test_text_alone_gives_batches_without_images(
    write_list: Callable, tokenizer_file: Path
) -> None:
    dataset = open_list(write_list(T=[record("what", "yes"), record("of", "no")]), tokenizer_file)
    batch = next(iterate(dataset, 0, 1, 1, 1))
    assert batch.num_samples == 2
    assert batch.pixel_values.shape == (0, 3, 28, 28) and len(batch.image_starts) == 0


def test_hard_packing_shows_every_token_once_and_no_cut_image(
    tmp_path: Path, write_list: Callable, tokenizer_file: Path
) -> None:
    list_file = write_list(A=mixed_records(tmp_path, 40))
    soft = open_list(list_file, tokenizer_file)
    hard = open_list(list_file, tokenizer_file, dset_pack_level="hard", max_length=64)
    batches = {
        name: list(iterate(dataset, 0, 1, 1, 1, total_packs=dataset.total_packs(1)))
        for name, dataset in (("soft", soft), ("hard", hard))
    }
    for count in (
        lambda batch: batch.num_tokens,
        lambda batch: len(batch.pixel_values),
        lambda batch: batch.num_samples,
    ):
        assert sum(map(count, batches["soft"])) == sum(map(count, batches["hard"]))
    image_id, size = hard.encoder.tokenizer.image_token_id, VISION.tokens_per_image
    for batch in batches["hard"]:
        for start in batch.image_starts.tolist():
            assert (batch.tokens[start : start + size] == image_id).all()


class TestDamagedShard:
    """Bytes that changed after the shard was written: every rank comes to the same decision."""

    @pytest.fixture
    def damaged(
        self, tmp_path: Path, write_list: Callable, tokenizer_file: Path
    ) -> tuple[PackDataset, str]:
        list_file = write_list(A=mixed_records(tmp_path, 10))
        dataset = open_list(list_file, tokenizer_file, tmp_path / "rejected.jsonl")
        row = next(i for i in range(10) if dataset.shards.rows[i]["images"] == 2)
        key = dataset.shards.read(row).key
        path = tmp_path / "shards" / dataset.shards.manifest.shards[0].name
        content = bytearray(path.read_bytes())
        content[int(dataset.shards.rows[row]["offset"]) + 2000] ^= 1
        path.write_bytes(content)
        return dataset, key

    def test_its_place_becomes_padding_and_the_rest_stays(
        self, damaged: tuple[PackDataset, str]
    ) -> None:
        dataset, key = damaged
        total = dataset.total_packs(1)
        batches = list(iterate(dataset, 0, 1, 1, 1, total_packs=total))
        keys = [k for batch in batches for k in batch.keys]
        assert len(keys) == 9 and key not in keys
        (rejection,) = (found for batch in batches for found in batch.rejections)
        assert "checksum" in rejection.reason

    def test_it_is_told_by_the_rank_that_comes_to_it_and_counted_once_by_all(
        self, damaged: tuple[PackDataset, str]
    ) -> None:
        dataset, _ = damaged
        total = dataset.total_packs(2)
        found = [
            rejection
            for rank in range(4)
            for batch in iterate(dataset, rank, 4, 1, 4, total_packs=total)
            for rejection in batch.rejections
        ]
        assert len(found) == 2  # once an epoch
        dataset.max_rejected = 0.1
        dataset.reject(found)
        assert len(dataset.ledger) == 1
        dataset.max_rejected = 0.05
        with pytest.raises(ValueError, match="1 of 10 samples cannot be used"):
            dataset.reject(found)

    def test_ranks_without_pixels_see_the_same_tokens(
        self, damaged: tuple[PackDataset, str]
    ) -> None:
        dataset, _ = damaged
        total = dataset.total_packs(1)
        for a, b in zip(
            iterate(dataset, 0, 1, 1, 1, total_packs=total),
            iterate(dataset, 0, 1, 1, 1, total_packs=total, image_share=None),
            strict=True,
        ):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
