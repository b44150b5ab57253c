"""Each image of a micro-batch is encoded once, by one of the ranks that see the micro-batch."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gmai.runtime.groups import Groups


def encode_shared(encode: Callable[[Tensor], Tensor], pixels: Tensor, groups: Groups) -> Tensor:
    """Encode [N, 3, I, I] with each rank of TP x CP taking its share; all get [N, P, H].

    Every rank encodes the same number (`ImageShare.length`); blank images fill up. Their features
    are cut off, so their gradient is exactly zero.
    """
    share, count = groups.image_share, pixels.size(0)
    blanks = share.length(count) * share.ranks - count
    if blanks:
        pixels = torch.cat([pixels, pixels.new_zeros(blanks, *pixels.shape[1:])])
    own = share.own(count)
    features = encode(pixels[own.start : own.stop])  # [share, P, H]
    if share.ranks > 1:
        features = _GatherFeatures.apply(features, groups)
    return features[:count]


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
    mine = by_rank[:, tp.rank()].contiguous()  # [CP, share, P, H]
    if cp.size() == 1:
        return mine[0]
    own = mine.new_empty(mine.shape[1:])
    dist.reduce_scatter_tensor(own, mine.flatten(0, 1), group=cp)
    return own
