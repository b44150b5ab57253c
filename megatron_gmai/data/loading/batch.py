"""One micro-batch: packs laid end to end, as the model takes them.

Legend: M packs of S = max_length tokens, T = M * S, N images of I x I pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_gmai.config import IGNORE_INDEX
from megatron_gmai.data.ledger import Rejection
from megatron_gmai.data.loading.augment import Tone
from megatron_gmai.data.text.template import Rendered


@dataclass(frozen=True)
class MicroBatch:
    """CPU tensors. Padding at the end of a pack is a segment of its own without labels."""

    tokens: torch.Tensor  # int64 [T]; image placeholders hold the image token's id
    labels: torch.Tensor  # int64 [T], shifted: what position t has to predict; -100: nothing
    position_ids: torch.Tensor  # int64 [T], from 0 in each segment
    cu_seqlens: torch.Tensor  # int32 [segments + 1], from 0 to T
    max_seqlen: int
    # uint8 [N, 3, I, I], channels last in memory, not normalised; `iterate` says who has them.
    pixel_values: torch.Tensor
    image_starts: torch.Tensor  # int64 [N], flat position of each image's first placeholder
    num_samples: int
    num_tokens: int  # without padding
    keys: tuple[str, ...]
    rejections: tuple[Rejection, ...] = ()  # samples that could not be read: their place is padding
    first_image: int = 0  # so many images of this data-parallel rank's step were planned before it

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any]]]:
        """Pickles its tensors as bytes, since torch would open a shared file for each of them, and
        its integers in half their size, which fits token ids and places in a batch."""
        return _from_arrays, ({name: _to_array(value) for name, value in vars(self).items()},)

    def without_tail(self, multiple: int) -> "MicroBatch":
        """The same batch without its last segment, if that has neither labels nor images; what is
        left is a multiple of so many tokens. Loss and gradients are the same."""
        begin, end = self.cu_seqlens[-2:].tolist()
        keep = -(-begin // multiple) * multiple
        has_images = bool((self.image_starts >= begin).any())
        if not 0 < keep < end or has_images or bool((self.labels[begin:] != IGNORE_INDEX).any()):
            return self
        bounds = self.cu_seqlens[:-1]
        if keep > begin:
            bounds = torch.cat([bounds, self.cu_seqlens.new_tensor([keep])])
        return replace(
            self,
            tokens=self.tokens[:keep],
            labels=self.labels[:keep],
            position_ids=self.position_ids[:keep],
            cu_seqlens=bounds,
            max_seqlen=int((bounds[1:] - bounds[:-1]).max()),
        )

    def pin_memory(self) -> "MicroBatch":
        """The same batch in page-locked memory, for copies that overlap with computation."""
        tensors = {
            name: value.pin_memory()
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return MicroBatch(**{**vars(self), **tensors})


def _to_array(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    array = value.numpy()
    return array.astype(np.int32) if array.dtype == np.int64 else array


def _from_arrays(fields: dict[str, Any]) -> MicroBatch:
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            fields[name] = torch.from_numpy(value)
    for name in ("tokens", "labels", "position_ids", "image_starts"):
        fields[name] = fields[name].long()
    return MicroBatch(**fields)


class SampleImage(NamedTuple):
    """An image file of a sample, and how to change its tone, if at all."""

    key: str  # the sample's
    data: bytes
    tone: Tone | None


@dataclass(frozen=True)
class Segment:
    """Tokens start up to stop of one sample. `sample` is None where a sample that was planned
    cannot be read: its place becomes padding."""

    key: str
    sample: Rendered | None
    start: int
    stop: int
    images: Sequence[SampleImage] = ()  # those inside start:stop


class BatchBuilder:
    """Fills the arrays of one micro-batch, pack after pack."""

    def __init__(self, packs: int, max_length: int, pad_id: int) -> None:
        self.max_length = max_length
        total = packs * max_length
        self.tokens = np.full(total, pad_id, dtype=np.int64)
        self.labels = np.full(total, IGNORE_INDEX, dtype=np.int64)
        self.bounds = [0]
        self.image_starts: list[int] = []
        self.images: list[SampleImage] = []
        self.keys: list[str] = []
        self.rejections: list[Rejection] = []
        self.samples = self.filled = 0

    def add_pack(self, segments: Sequence[Segment]) -> None:
        """Appends one pack; what it leaves free becomes its padding segment."""
        end = self.bounds[-1] + self.max_length
        for segment in segments:
            self._add(segment)
        if self.bounds[-1] < end:
            self.bounds.append(end)

    def _add(self, segment: Segment) -> None:
        first = self.bounds[-1]
        last = first + segment.stop - segment.start
        self.bounds.append(last)
        if segment.sample is None:
            return
        inside = slice(segment.start, segment.stop)
        self.tokens[first:last] = segment.sample.tokens[inside]
        self.labels[first : last - 1] = segment.sample.labels[inside][1:]
        starts = segment.sample.image_starts
        starts = starts[(starts >= segment.start) & (starts < segment.stop)]
        self.image_starts += (starts - segment.start + first).tolist()
        self.images += segment.images
        self.filled += last - first
        if segment.start == 0:
            self.samples += 1
            self.keys.append(segment.key)

    def build(self, pixels: np.ndarray) -> MicroBatch:
        """The micro-batch, with `pixels` uint8 [N, 3, I, I] of `images`."""
        bounds = np.array(self.bounds, dtype=np.int64)
        sizes = np.diff(bounds)
        positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], sizes)
        return MicroBatch(
            tokens=torch.from_numpy(self.tokens),
            labels=torch.from_numpy(self.labels),
            position_ids=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
            max_seqlen=int(sizes.max()),
            pixel_values=torch.from_numpy(pixels),
            image_starts=torch.tensor(self.image_starts, dtype=torch.int64),
            num_samples=self.samples,
            num_tokens=self.filled,
            keys=tuple(self.keys),
            rejections=tuple(self.rejections),
        )
