"""Each image of a micro-batch is encoded once, by one of the ranks that see the micro-batch.

Shapes: N images of a micro-batch, `share` of them on this rank (`ImageShare`), P tokens an image,
H hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gmai.layout import ImageShare
from megatron_gmai.runtime.groups import Groups


def encode_shared(
    encode: Callable[[Tensor], Tensor], pixels: Tensor, first_image: int, groups: Groups
) -> Tensor:
    """Encode [N, 3, I, I] with each rank of TP x CP taking its share; all get [N, P, H].

    first_image: how many images of the step came before these. Every rank encodes the same number
    (`ImageShare.length`); blank images fill up. Their features are left out, so their gradient is
    exactly zero.
    """
    share, count = share_of_column(first_image, groups), pixels.size(0)
    own = share.own(count)
    mine = pixels[own.start :: own.step]
    if blanks := share.length(count) - len(own):
        mine = torch.cat([mine, mine.new_zeros(blanks, *mine.shape[1:])])
    return gather_features(encode(mine), count, first_image, groups)


def share_of_column(first_image: int, groups: Groups) -> ImageShare:
    """The images of a micro-batch whose features this rank of TP x CP contributes."""
    return ImageShare(groups.images.rank(), groups.images.size()).after(first_image)


def gather_features(features: Tensor, count: int, first_image: int, groups: Groups) -> Tensor:
    """[share, P, H] of each rank of TP x CP -> [N, P, H] of all `count` images, in their order."""
    ranks, length = groups.images.size(), features.size(0)
    if ranks == 1:
        return features[:count]
    gathered = _GatherFeatures.apply(features, groups)  # [TP · CP · share, P, H], rank by rank
    number = torch.arange(count, device=features.device)
    return gathered.index_select(0, (number + first_image) % ranks * length + number // ranks)


class _GatherFeatures(torch.autograd.Function):
    """[share, P, H] of each rank -> [TP · CP · share, P, H] on all of them."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, groups: Groups) -> Tensor:
        ctx.groups = groups
        gathered = features.new_empty(groups.images.size() * features.size(0), *features.shape[1:])
        dist.all_gather_into_tensor(gathered, features.contiguous(), group=groups.images)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return own_gradient(gradient, ctx.groups), None


def own_gradient(gradient: Tensor, groups: Groups) -> Tensor:
    """The whole gradient of this rank's features: [TP · CP · share, P, H] -> [share, P, H].

    Over TP the gradient that arrives is the whole one already: the sequence-parallel scatter after
    the merge gathers it, or the column-parallel layers reduce it. A sum here would count it TP
    times, which doubles the tower's gradient while the first losses still look right. Over CP it is
    a part: each rank's tokens contribute their own, so there it is summed.
    """
    tp, cp = groups.tp, groups.cp
    # Ranks of TP x CP stand in the order cp · TP + tp.
    by_rank = gradient.view(cp.size(), tp.size(), -1, *gradient.shape[1:])
    # [CP, share, P, H]; a view would keep the other ranks' parts in memory.
    mine = by_rank[:, tp.rank()].clone(memory_format=torch.contiguous_format)
    if cp.size() == 1:
        return mine[0]
    own = mine.new_empty(mine.shape[1:])
    dist.reduce_scatter_tensor(own, mine.flatten(0, 1), group=cp)
    return own
