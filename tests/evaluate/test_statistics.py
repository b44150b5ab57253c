"""Intervals cover what they should, and images rather than questions are drawn."""

import numpy as np
import pytest

from megatron_gmai.evaluate.statistics import bootstrap, paired_test


def test_an_interval_contains_the_mean_and_is_as_wide_as_theory_says() -> None:
    rng = np.random.default_rng(1)
    scores = (rng.random(400) < 0.7).astype(float)
    interval = bootstrap(list(scores), [str(i) for i in range(400)])
    width = 2 * 1.96 * np.sqrt(scores.mean() * (1 - scores.mean()) / 400)
    assert interval.low < scores.mean() < interval.high
    assert interval.high - interval.low == pytest.approx(width, rel=0.1)


def test_ten_questions_about_an_image_with_one_answer_count_as_one() -> None:
    rng = np.random.default_rng(2)
    of_image = (rng.random(40) < 0.5).astype(float)
    scores, images = list(np.repeat(of_image, 10)), [str(i // 10) for i in range(400)]
    together = bootstrap(scores, images)
    apart = bootstrap(scores, [str(i) for i in range(400)])
    ratio = (together.high - together.low) / (apart.high - apart.low)
    assert ratio == pytest.approx(np.sqrt(10), rel=0.15)


def test_drawing_kinds_of_images_is_drawing_images() -> None:
    rng = np.random.default_rng(3)
    images = [str(i) for i in rng.integers(0, 60, 300)]
    scores = list((rng.random(300) < 0.4).astype(float))
    names = sorted(set(images))
    sums = np.array([sum(s for s, i in zip(scores, images, strict=True) if i == n) for n in names])
    counts = np.array([images.count(n) for n in names])
    drawn = rng.integers(0, len(names), (4000, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    interval = bootstrap(scores, images)
    expected = np.quantile(means, [0.025, 0.975])
    assert [interval.low, interval.high] == pytest.approx(expected, abs=0.01)


def test_the_same_scores_give_the_same_interval() -> None:
    scores, images = [1.0, 0.0, 0.25] * 20, [str(i) for i in range(60)]
    assert bootstrap(scores, images) == bootstrap(scores, images)
    assert bootstrap([1.0] * 5, list("abcde")) == bootstrap([1.0], ["a"])


def test_models_that_do_not_differ_are_not_told_apart_and_others_are() -> None:
    rng = np.random.default_rng(4)
    images = [str(i) for i in range(300)]
    a, b = ((rng.random(300) < 0.6).astype(float) for _ in range(2))
    assert paired_test(list(a), list(a), images).p_value == 1
    assert paired_test(list(a), list(b), images).p_value > 0.05
    better = np.where(rng.random(300) < 0.2, 1.0, a)
    test = paired_test(list(a), list(better), images)
    assert test.p_value < 0.001 and test.interval.low > 0
    assert test.difference == pytest.approx(better.mean() - a.mean())


def test_the_p_value_is_uniform_where_models_are_alike() -> None:
    rng = np.random.default_rng(5)
    images = [str(i // 2) for i in range(80)]
    values = []
    for _ in range(150):
        a, b = ((rng.random(80) < 0.5).astype(float) for _ in range(2))
        values.append(paired_test(list(a), list(b), images).p_value)
    assert np.mean(np.array(values) < 0.1) == pytest.approx(0.08, abs=0.07)


def test_an_exact_sign_test_of_few_images_agrees() -> None:
    # Five images, B better on each by one: 2 of the 32 exchanges are as far.
    test = paired_test([0.0] * 5, [1.0] * 5, list("abcde"))
    assert test.p_value == pytest.approx(2 / 32, abs=0.01)
