"""What the server asks of a model, whatever it is and wherever it runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_gmai.data.text.conversation import Conversation


@dataclass(frozen=True)
class Request:
    """A conversation that ends with the user's turn, its images in the order of their tags."""

    conversation: Conversation
    images: tuple[np.ndarray, ...]  # as the model's `prepare` has made them
    max_tokens: int
    temperature: float = 0.0  # 0: the most probable token
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Piece:
    """A part of the answer to one request of a batch."""

    place: int  # in the batch
    text: str
    tokens: int = 1
    finish: str | None = None  # "stop" or "length" with the last piece


class Generator(Protocol):
    """A model that answers batches. Called from one thread."""

    name: str

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [height, width, 3], windowed, as the model takes it: small, for many may wait."""
        ...

    def prompt_tokens(self, request: Request) -> int:
        """Tokens of the prompt. Raises BadSample for one that leaves no room for an answer."""
        ...

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Piece]]:
        """What each step adds to the answers; ends when every request has a piece with a finish.

        The caller may close it early, when nobody waits any more.
        """
        ...
