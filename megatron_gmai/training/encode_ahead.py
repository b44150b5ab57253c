"""`--vision-phase all-ranks`: a step's images are encoded by all pipeline ranks, before its first
micro-batch; the gradients of their features are taken back after the last one.

Shapes: `length` images on each rank, blanks included; P tokens an image, H hidden.

The ranks with one TP and one CP coordinate, one of each pipeline stage, are a column. A column has
its share of each micro-batch's images, as in the other phase, and its pipeline ranks share out
those. Their features go to the column's first rank, where each micro-batch gathers them over the
columns when it runs. There the graph is cut: each micro-batch has leaves of its own, whose
gradients go back to the ranks that encoded, for one backward pass through tower and projector.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_gmai.data.loading.batch import MicroBatch
from megatron_gmai.layout import ImageShare
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.model.vision_parallel import share_of_column
from megatron_gmai.runtime.groups import Groups
from megatron_gmai.runtime.world import World

Place = tuple[int, int]  # of an image in its column: pipeline rank, number among that rank's images


@dataclass(frozen=True)
class EncodedStep:
    """The features of a step's images, and the way back for their gradients."""

    # Of the features that were encoded here; None if neither tower nor projector is trained. The
    # features themselves have gone to the first stage.
    edge: GradientEdge | None
    length: int  # of these
    blank: Tensor  # [P, H] zeros
    leaves: list[Tensor | None]  # [share, P, H] of each micro-batch, on ranks of the first stage
    places: list[list[Place]]  # of each leaf's images
    groups: Groups

    def backward(self) -> None:
        """Run the backward pass of what was encoded here; every pipeline rank has to call it."""
        if self.edge is None:
            return
        pp = self.groups.pp
        parts = self._gradients_by_rank() if pp.rank() == 0 else None
        self.leaves.clear()  # with their gradients, before the tower needs the memory
        if pp.size() == 1 and parts:
            gradient = parts[0]
        else:
            gradient = self.blank.new_empty(self.length, *self.blank.shape)
            dist.scatter(gradient, parts, src=dist.get_global_rank(pp, 0), group=pp)
        parts = None
        torch.autograd.backward(self.edge, gradient)

    def _gradients_by_rank(self) -> list[Tensor]:
        """[length, P, H] for each pipeline rank of the column; zero for blank images."""
        rows = [[self.blank] * self.length for _ in range(self.groups.pp.size())]
        for leaf, places in zip(self.leaves, self.places, strict=True):
            assert leaf is not None and leaf.grad is not None
            for (rank, number), gradient in zip(places, leaf.grad, strict=False):
                rows[rank][number] = gradient
        return [torch.stack(images) for images in rows]


def encode_step(
    model: GMAIVL, batches: Iterator[MicroBatch], world: World
) -> tuple[list[MicroBatch], EncodedStep]:
    """Encode the images of a step's micro-batches, which come back without their pixels."""
    share, device = world.image_share, world.device.torch_device
    assert share is not None
    images: list[Tensor] = []
    rest: list[MicroBatch] = []
    side = 0
    for batch in batches:
        pixels, side = batch.pixel_values, batch.pixel_values.size(-1)
        own = share.after(batch.first_image).own(len(pixels))
        # One by one: parts of page-locked memory are copied without a wait if they are whole.
        images += [pixels[number].to(device, non_blocking=True) for number in own]
        rest.append(replace(batch, pixel_values=pixels.new_empty(0, *pixels.shape[1:])))
    length = images_of_each_rank([(b.first_image, len(b.image_starts)) for b in rest], share.ranks)
    blank = torch.zeros(3, side, side, dtype=torch.uint8, device=device)
    stacked = torch.stack([*images, *[blank] * (length - len(images))])
    own_features = model.encode_own(stacked)
    trains = own_features.requires_grad
    places = places_in_column(rest, world.groups)
    by_rank = gather_in_column(own_features.detach(), world.groups)
    leaves = [
        leaf_of(by_rank, where, batch, world.groups, trains)
        for batch, where in zip(rest, places, strict=True)
    ]
    edge = get_gradient_edge(own_features) if trains else None
    no_image = own_features.new_zeros(own_features.shape[1:])
    return rest, EncodedStep(edge, length, no_image, leaves, places, world.groups)


def images_of_each_rank(micro_batches: Sequence[tuple[int, int]], ranks: int) -> int:
    """Images that each of `ranks` ranks encodes in a step, of micro-batches given by the number of
    images before them and their own. Ranks with fewer fill up with blanks, and one at least is
    encoded: gradient reduction expects every parameter to take part.
    """
    totals = [0] * ranks
    for first, count in micro_batches:
        for index in range(ranks):
            totals[index] += len(ImageShare(index, ranks).after(first).own(count))
    return max(1, *totals)


def places_in_column(batches: Sequence[MicroBatch], groups: Groups) -> list[list[Place]]:
    """Of each micro-batch, where its column's images are encoded."""
    columns, stages = groups.images.size(), groups.pp.size()
    taken = [0] * stages
    places = []
    for batch in batches:
        here: list[Place] = []
        for number in share_of_column(batch.first_image, groups).own(len(batch.image_starts)):
            rank = (batch.first_image + number) // columns % stages
            here.append((rank, taken[rank]))
            taken[rank] += 1
        places.append(here)
    return places


def gather_in_column(features: Tensor, groups: Groups) -> list[Tensor]:
    """[length, P, H] of each pipeline rank on the column's first rank; nothing elsewhere."""
    pp = groups.pp
    if pp.size() == 1:
        return [features]
    is_first = pp.rank() == 0
    gathered = [torch.empty_like(features) for _ in range(pp.size())] if is_first else []
    target = dist.get_global_rank(pp, 0)
    dist.gather(features.contiguous(), gathered if is_first else None, dst=target, group=pp)
    return gathered


def leaf_of(
    by_rank: list[Tensor], places: list[Place], batch: MicroBatch, groups: Groups, trains: bool
) -> Tensor | None:
    """[share, P, H] of a micro-batch's images, blanks at the end; a leaf of the micro-batch's graph
    if it is trained. None on ranks that do not merge them, and where nothing can matter."""
    count = len(batch.image_starts)
    if not by_rank or (count == 0 and not trains):
        return None
    rows = [by_rank[rank][number] for rank, number in places]
    blanks = share_of_column(batch.first_image, groups).length(count) - len(rows)
    blank = by_rank[0].new_zeros(by_rank[0].shape[1:])
    return torch.stack([*rows, *[blank] * blanks]).requires_grad_(trains)
