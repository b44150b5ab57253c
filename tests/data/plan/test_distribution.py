"""No step is special: its samples are a fair draw from the mixture, whatever the packing.

Two data sets of very different length lie in shards of their own, one with images and one without,
which is the hardest case for an order that reads few shards at a time.
"""

import numpy as np
import pytest

from megatron_gmai.data.plan.plan import Plan
from megatron_gmai.data.plan.windows import PlanSettings, Windows
from megatron_gmai.data.shards.lengths import LENGTH_ROW

SAMPLES, SHARD, STEP, LIMIT = 60_000, 500, 64, 2048
IMAGES = np.arange(SAMPLES) < 0.75 * SAMPLES


def lengths() -> np.ndarray:
    generator = np.random.default_rng(0)
    mean = np.where(IMAGES, 150.0, 300.0)
    text = np.exp(generator.normal(np.log(mean) - 0.18, 0.6))
    return (576 * IMAGES + text).astype(int).clip(8, LIMIT)


@pytest.fixture(scope="module", params=["soft", "best-fit"])
def scores(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    """How many standard errors each step's mean length and image share are off the mixture's."""
    table = np.zeros(SAMPLES, dtype=LENGTH_ROW)
    table["length"] = lengths()
    bounds = np.arange(0, SAMPLES + 1, SHARD)
    sources = np.where(IMAGES[bounds[:-1]], 0, 1)
    settings = PlanSettings(1, LIMIT, request.param, window=10_000)
    plan = Plan(Windows(table, bounds, sources, [1.0, 1.0], settings))
    scores: dict[str, list[float]] = {"length": [], "images": []}
    for start in range(0, plan.total(0) - STEP, STEP):
        samples = plan.packs(start, start + STEP).samples
        for name, values in (("length", table["length"]), ("images", IMAGES)):
            error = values.std() / np.sqrt(len(samples))
            scores[name].append((values[samples].mean() - values.mean()) / error)
    return {name: np.array(values) for name, values in scores.items()}


@pytest.mark.parametrize("name", ["length", "images"])
def test_steps_vary_no_more_than_fair_draws(scores: dict[str, np.ndarray], name: str) -> None:
    assert len(scores[name]) > 200
    assert scores[name].std() < 1.25
    assert np.abs(scores[name]).max() < 4.5


@pytest.mark.parametrize("name", ["length", "images"])
def test_no_part_of_the_epoch_differs_from_the_whole(
    scores: dict[str, np.ndarray], name: str
) -> None:
    for part in np.array_split(scores[name], 8):
        assert abs(part.mean()) < 4 / np.sqrt(len(part))


@pytest.mark.parametrize("name", ["length", "images"])
def test_a_step_says_nothing_about_the_next(scores: dict[str, np.ndarray], name: str) -> None:
    correlation = np.corrcoef(scores[name][:-1], scores[name][1:])[0, 1]
    assert abs(correlation) < 3.5 / np.sqrt(len(scores[name]))
