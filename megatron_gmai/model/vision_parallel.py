"""Each image of a micro-batch is encoded once, by one rank of the tensor-parallel group."""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup


def encode_shared(
    encode: Callable[[Tensor], Tensor], pixels: Tensor, group: ProcessGroup
) -> Tensor:
    """Encode [N, 3, I, I] with rank r of the group taking the r-th share; all get [N, P, H].

    Every rank encodes the same number, at least one: a rank that skipped the tower would leave the
    others waiting in the gather, and its gradient buffers stale. Blank images fill up; their
    features are cut off, so their gradient is exactly zero.

    The gradient that returns here is already the whole one on each rank (the sequence-parallel
    scatter after the merge gathers it, the column-parallel layers reduce it), so backward takes
    this rank's slice; a reduce-scatter would count it once per rank.
    """
    count, size = pixels.size(0), group.size()
    share = max(1, -(-count // size))
    blanks = share * size - count
    if blanks:
        pixels = torch.cat([pixels, pixels.new_zeros(blanks, *pixels.shape[1:])])
    features = encode(pixels[group.rank() * share : (group.rank() + 1) * share])  # [share, P, H]
    if size > 1:
        features = gather_from_sequence_parallel_region(
            features, tensor_parallel_output_grad=False, group=group
        )
    return features[:count]
