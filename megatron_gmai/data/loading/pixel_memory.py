"""Shared memory through which loader processes hand over pixels.

Taken once and whole: a file for each batch would cost more than a copy, and a copy would cost a
tenth of the loader's speed.
"""

import weakref

import torch


class PixelMemory:
    """Slots for the pixels of micro-batches, each free again when nothing refers to its pixels."""

    def __init__(self, slots: int, images: int, side: int) -> None:
        """`images`: as many as one micro-batch can have."""
        shape = (slots, images, side, side, 3)
        self.pixels = torch.empty(shape, dtype=torch.uint8).share_memory_()
        self.free = list(range(slots))

    def take(self) -> int | None:
        """A slot for a process to write into; None while all are in use."""
        return self.free.pop() if self.free else None

    def hand_out(self, slot: int, images: int) -> torch.Tensor:
        """uint8 [images, 3, side, side] of a slot that was taken and written."""
        # Every tensor made from this array, and every view of those, keeps the array alive.
        array = self.pixels[slot, :images].numpy()
        weakref.finalize(array, self.free.append, slot)
        return torch.from_numpy(array).permute(0, 3, 1, 2)
