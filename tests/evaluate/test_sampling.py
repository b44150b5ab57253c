"""Drawn tokens: their frequencies, the nucleus, and what a seed repeats."""

import numpy as np
import pytest
import torch

from megatron_gmai.evaluate.sampling import Drawing, Sampling, choose

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def drawn(temperature: float, top_p: float, count: int = 2000) -> np.ndarray:
    drawing = Drawing(Sampling(temperature, top_p, seed=1))
    tokens = [int(choose(LOGITS, [drawing])) for _ in range(count)]
    return np.bincount(tokens, minlength=4) / count


def test_tokens_are_drawn_by_their_probability() -> None:
    expected = (LOGITS[0] / 0.7).softmax(-1).numpy()
    assert drawn(0.7, 1.0) == pytest.approx(expected, abs=0.04)


def test_a_nucleus_keeps_the_fewest_that_reach_it() -> None:
    assert (drawn(1.0, 0.8) > 0).tolist() == [True, True, False, False]
    assert drawn(1.0, 0.0, 100).tolist() == [1, 0, 0, 0]


def test_no_temperature_means_the_most_probable() -> None:
    assert drawn(0.0, 1.0, 100).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("temperature", [1e-4, 1e-38, 1e-40, 5e-324])
def test_next_to_none_does_not_harm_the_others(temperature: float) -> None:
    both = [Drawing(Sampling(temperature)), Drawing(Sampling(1.0))]
    chosen = choose(torch.cat([LOGITS * 1e37, LOGITS]), both)
    assert int(chosen[0]) == 0


def test_a_seed_repeats_whatever_stands_beside_it() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 50)

    def tokens(beside: int, seed: int) -> list[int]:
        rows = [Drawing(Sampling(1.5, 0.9, seed=100 + row)) for row in range(beside)]
        rows.append(Drawing(Sampling(1.5, 0.9, seed=seed)))
        return [int(choose(logits.expand(beside + 1, -1), rows)[-1]) for _ in range(20)]

    assert tokens(0, 3) == tokens(5, 3) != tokens(0, 4)


def test_rounding_does_not_change_what_is_drawn() -> None:
    """Nearly equal probabilities change places in their order, but not in the vocabulary's."""
    logits = torch.zeros(1, 1000)
    noise = 1e-6 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    for seed in range(50):
        both = [Drawing(Sampling(1.0, seed=seed)) for _ in range(2)]
        one, two = choose(torch.cat([logits, logits + noise]), both).tolist()
        assert one == two


def test_questions_have_seeds_of_their_own() -> None:
    sampling = Sampling(0.5, 0.9, 7)
    assert sampling.of_question("1") == sampling.of_question("1") != sampling.of_question("2")
    assert sampling.of_question("1") != Sampling(0.5, 0.9, 8).of_question("1")
