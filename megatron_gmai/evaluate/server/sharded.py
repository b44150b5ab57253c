"""A model shared by several ranks behind one server: the first rank serves, the others follow.

Every call that runs the model is told to all ranks before it is made, so that all make the same
calls in the same order.
"""

import datetime
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_gmai.evaluate.server.generator import Piece, Request
from megatron_gmai.evaluate.server.model import ModelGenerator

# Followers wait as long as nobody asks; the groups of the model would take that for a lost rank.
_PATIENCE = datetime.timedelta(days=3650)


class Calls:
    """How the first rank tells the others; made by all ranks together."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def tell(self, name: str, *arguments: Any) -> None:
        dist.broadcast_object_list([name, arguments], src=0, group=self._group)

    def hear(self) -> tuple[str, tuple[Any, ...]]:
        call: list[Any] = [None, None]
        dist.broadcast_object_list(call, src=0, group=self._group)
        return call[0], call[1]


class Leader:
    """The generator of the first rank."""

    def __init__(self, generator: ModelGenerator, calls: Calls) -> None:
        self.generator, self.calls, self.name = generator, calls, generator.name

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        return self.generator.prepare(pixels)

    def prompt_tokens(self, request: Request) -> int:
        return self.generator.prompt_tokens(request)

    def admit(self, requests: Sequence[Request]) -> list[Piece]:
        self.calls.tell("admit", requests)
        return self.generator.admit(requests)

    def advance(self) -> list[Piece]:
        self.calls.tell("advance")
        return self.generator.advance()

    def keep(self, rows: Sequence[int]) -> None:
        self.calls.tell("keep", rows)
        self.generator.keep(rows)

    def end(self) -> None:
        """Lets the others go."""
        self.calls.tell("end")


def follow(generator: ModelGenerator, calls: Calls) -> None:
    """Makes the first rank's calls until it ends."""
    while True:
        name, arguments = calls.hear()
        if name == "end":
            return
        try:
            getattr(generator, name)(*arguments)
        except Exception:  # the first rank fails alike, tells its clients, and goes on
            traceback.print_exc(file=sys.stderr)
