"""How the next token is chosen: the most probable, or drawn.

Shapes: B answers, V vocabulary.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Below it nothing but the most probable token is drawn, and the quotients would overflow.
LEAST_TEMPERATURE = 1e-4


@dataclass(frozen=True)
class Sampling:
    """Temperature and nucleus (Holtzman et al. 2020, arXiv 1904.09751) of one answer."""

    temperature: float = 0.0  # 0: the most probable token
    top_p: float = 1.0
    seed: int = 0

    @property
    def draws(self) -> bool:
        return self.temperature >= LEAST_TEMPERATURE

    def of_question(self, index: str) -> "Sampling":
        """With a seed of its own: what is drawn depends neither on batches, nor on ranks, nor on
        what an earlier run has answered."""
        digest = hashlib.sha256(f"{self.seed} {index}".encode()).digest()
        return Sampling(self.temperature, self.top_p, int.from_bytes(digest[:8]))


GREEDY = Sampling()


class Drawing:
    """The random numbers of one answer, one for each token."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = random.Random(sampling.seed)

    def next(self) -> float:
        return self._random.random() if self.sampling.draws else 0.0


def choose(logits: Tensor, drawings: Sequence[Drawing]) -> Tensor:
    """The next token of each answer: [B, V] -> int64 [B]."""
    chosen = logits.argmax(dim=-1)
    rows = [row for row, drawing in enumerate(drawings) if drawing.sampling.draws]
    if rows:
        drawn = [drawings[row] for row in rows]
        chosen[rows] = _draw(logits[rows].double(), drawn)
    return chosen


def _draw(logits: Tensor, drawings: Sequence[Drawing]) -> Tensor:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    temperature = column([drawing.sampling.temperature for drawing in drawings])
    # The most probable token always stays: what stands before it sums to nothing.
    top_p = column([max(drawing.sampling.top_p, 1e-6) for drawing in drawings])
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    descending, order = probabilities.sort(dim=-1, descending=True)
    outside = descending.cumsum(-1) - descending >= top_p
    kept = probabilities.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)
    # By the vocabulary's order and not by probability: another layout's rounding, which may
    # exchange neighbours of the latter, then moves a boundary by no more than itself.
    cumulative = kept.cumsum(-1)
    uniform = column([drawing.next() for drawing in drawings])
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
