"""What the server asks of a model, whatever it is and wherever it runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_gmai.data.text.conversation import Conversation
from megatron_gmai.evaluate.sampling import GREEDY, Sampling


@dataclass(frozen=True)
class Request:
    """A conversation that ends with the user's turn, its images in the order of their tags."""

    conversation: Conversation
    images: tuple[np.ndarray, ...]  # as the model's `prepare` has made them
    max_tokens: int
    sampling: Sampling = GREEDY


@dataclass(frozen=True)
class Piece:
    """A part of one answer."""

    text: str
    tokens: int = 1
    finish: str | None = None  # "stop" or "length" with the last piece


class Generator(Protocol):
    """A model with answers under way, one a row. Called from one thread, but for the first two."""

    name: str

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [height, width, 3], windowed, as the model takes it: small, for many may wait."""
        ...

    def prompt_tokens(self, request: Request) -> int:
        """Tokens of the prompt. Raises BadSample for one that leaves no room for an answer."""
        ...

    def admit(self, requests: Sequence[Request]) -> list[Piece]:
        """The first piece of each answer; their rows come behind those under way, which a failure
        here does not touch."""
        ...

    def advance(self) -> list[Piece]:
        """The next piece of each answer under way; none of them may be finished."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order."""
        ...
