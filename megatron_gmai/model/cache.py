"""Keys and values of answers under way, so that a step computes nothing but its new tokens.

Shapes: B answers (rows), K places of the longest, G key-value groups of this tensor-parallel rank,
D head size, T tokens of all prompts. Rows begin at place 0 and have lengths of their own, so one
may join or leave between two steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


class KeyValueCache:
    """The cache of one pipeline stage's layers, each known by its number."""

    def __init__(self, lengths: Sequence[int], rooms: Sequence[int]) -> None:
        """Rows of prompts of these lengths, with room for so many tokens each."""
        self.lengths, self.rooms = list(lengths), list(rooms)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # two of [B, G, K, D]
        self._positions = self._visible = torch.empty(0)

    def holds(self, layer: int) -> bool:
        """Whether a layer's prompts are stored, and single tokens follow."""
        return layer in self.layers

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """The prompts' [T, G, D], one behind the other."""
        self.layers[layer] = self._rows(key), self._rows(value)

    def _rows(self, packed: Tensor) -> Tensor:
        rows = packed.new_zeros(len(self.lengths), max(self.rooms), *packed.shape[1:])
        for row, tokens in zip(rows, packed.split(self.lengths), strict=True):
            row[: len(tokens)] = tokens
        return rows.transpose(1, 2).contiguous()

    def begin_step(self, device: torch.device) -> None:
        """Each row gets a token; all layers put it in the same place."""
        self._positions = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        position = torch.arange(max(self.lengths), device=device)
        self._visible = (position <= self._positions[:, None])[:, None, None]  # [B, 1, 1, K]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A token of each row, [B, G, D] -> all keys and values [B, G, K, D], and which of them
        are real, bool [B, 1, 1, K]."""
        keys, values = self.layers[layer]
        rows, longest = torch.arange(len(self.lengths), device=key.device), max(self.lengths)
        keys[rows, :, self._positions], values[rows, :, self._positions] = key, value
        return keys[:, :, :longest], values[:, :, :longest], self._visible

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows stay, in this order."""
        self.lengths = [self.lengths[row] for row in rows]
        self.rooms = [self.rooms[row] for row in rows]
        room = max(self.rooms, default=0)
        for layer, pair in self.layers.items():
            key, value = (whole[list(rows), :, :room] for whole in pair)
            self.layers[layer] = key, value

    def join(self, other: "KeyValueCache") -> None:
        """Another cache's rows come behind these."""
        self.lengths += other.lengths
        self.rooms += other.rooms
        room = max(self.rooms)
        for layer, theirs in other.layers.items():
            pairs = zip(self.layers[layer], theirs, strict=True)
            key, value = (
                torch.cat([_with_room(one, room), _with_room(two, room)]) for one, two in pairs
            )
            self.layers[layer] = key, value


def _with_room(cached: Tensor, room: int) -> Tensor:
    return pad(cached, (0, 0, 0, room - cached.size(2)))
