"""Augmentation changes the tone of a picture, never what it shows, and never by history."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_gmai.data.loading.augment import Tone, choose_tone
from megatron_gmai.data.loading.loader import iterate
from tests.data.world import mixed_records, open_list

LEVELS = np.arange(256, dtype=np.uint8)


def test_tones_stay_within_a_tenth_and_keep_the_order_of_levels() -> None:
    tones = [choose_tone(1, pack, sample) for pack in range(20) for sample in range(20)]
    contrasts = np.array([tone.contrast for tone in tones])
    shifts = np.array([tone.shift for tone in tones])
    assert 0.9 <= contrasts.min() < 0.92 and 1.08 < contrasts.max() <= 1.1
    assert -12.8 <= shifts.min() < -10 and 10 < shifts.max() <= 12.8
    for tone in tones:
        assert (np.diff(tone.apply(LEVELS).astype(int)) >= 0).all()


def test_the_neutral_tone_changes_nothing() -> None:
    assert np.array_equal(Tone(1.0, 0.0).apply(LEVELS), LEVELS)


def test_only_the_pictures_of_data_sets_that_ask_for_it_are_changed(
    tmp_path: Path, write_list: Callable, tokenizer_file: Path
) -> None:
    records = mixed_records(tmp_path, 12)
    plain = open_list(write_list(A=records), tokenizer_file)
    total = plain.total_packs(1)
    augmented = open_list(write_list(A=records, augment=True), tokenizer_file)
    pairs = zip(
        iterate(plain, 0, 1, 1, 1, 0, total), iterate(augmented, 0, 1, 1, 1, 0, total), strict=True
    )
    for before, after in pairs:
        assert torch.equal(before.tokens, after.tokens)
        assert not len(before.pixel_values) or not torch.equal(
            before.pixel_values, after.pixel_values
        )


def test_the_next_epoch_shows_a_sample_differently() -> None:
    assert len({choose_tone(1, pack, 7) for pack in range(50)}) == 50


def test_the_layout_changes_no_pixel(
    tmp_path: Path, write_list: Callable, tokenizer_file: Path
) -> None:
    dataset = open_list(write_list(A=mixed_records(tmp_path, 24), augment=True), tokenizer_file)

    def pictures(dp: int, start: int) -> list[bytes]:
        batches = [b for rank in range(dp) for b in iterate(dataset, rank, dp, 1, 4, start, 12)]
        return sorted(image.numpy().tobytes() for b in batches for image in b.pixel_values)

    assert pictures(1, 0) == pictures(4, 0) == sorted(pictures(2, 4) + pictures_of(dataset, 4))


def pictures_of(dataset, stop: int) -> list[bytes]:
    """Pictures of the packs before `stop`."""
    batches = iterate(dataset, 0, 1, 1, 4, 0, stop)
    return [image.numpy().tobytes() for b in batches for image in b.pixel_values]
