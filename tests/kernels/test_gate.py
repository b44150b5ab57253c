"""Every Triton kernel of the project, compiled for four chips: registers, spills, shared memory,
widths.

The shapes are those that the launchers see in training: bfloat16, hidden sizes of language model
and vision tower, vocabularies whole and cut into 1 to 8 slices. Another compiler allocates other
registers: the bars hold with the pinned Triton, which is the one that belongs to the pinned torch.
"""

import pytest
import torch
import triton

from gmai_kernels import cross_entropy_triton, rms_norm_triton
from gmai_kernels.linear_cross_entropy import _logits_buffer
from gmai_kernels.testing.gate import GFX942, SM_80, SM_90, SM_100, TARGETS, check, compiling
from gmai_kernels.vocabulary import true_columns

pytestmark = pytest.mark.pinned

HIDDEN = (512, 1024, 2048, 4096, 5120, 8192, 16384)
VOCABULARIES = (32000, 92544, 92553, 151936)
NVIDIA = (SM_80, SM_90, SM_100)
ROWS = 16

# Registers per thread that a kernel may use on sm_80, sm_90 and sm_100, by the size of its block: a
# size that is not listed has the cap of the next smaller one. An AMD lane may use 128.
FORWARD_CAPS = {512: (40, 40, 40), 1024: (32, 32, 32), 16384: (64, 64, 64)}
BACKWARD_CAPS = {512: (64, 64, 64)}
STATISTICS_CAPS = (58, 60, 64)
GRADIENT_CAPS = (32, 32, 32)
AMD_CAP = 128

every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


def cap(caps: tuple[int, int, int], target) -> int:
    return AMD_CAP if target is GFX942 else caps[NVIDIA.index(target)]


def cap_for(hidden: int, caps: dict[int, tuple[int, int, int]], target) -> int:
    block = triton.next_power_of_2(hidden)
    return cap(caps[max(size for size in caps if size <= block)], target)


def slices(vocabulary: int) -> list[tuple[int, int]]:
    """(columns held, true columns) of the first and the last rank at TP 1 to 8."""
    found = []
    for ranks in (1, 2, 4, 8):
        held = -(-vocabulary // (128 * ranks)) * 128
        found += [(held, true_columns(held, rank * held, vocabulary)) for rank in (0, ranks - 1)]
    return sorted(set(found))


@every_target
@pytest.mark.parametrize("hidden", HIDDEN)
def test_rms_norm(target, hidden):
    x = torch.empty(ROWS, hidden, dtype=torch.bfloat16)
    weight = torch.empty(hidden, dtype=torch.bfloat16)
    r = torch.empty(ROWS, 1)
    with compiling(target) as forward:
        rms_norm_triton.forward(x, weight, 1e-6)
    with compiling(target) as backward:
        rms_norm_triton.backward(x, x, r, weight, True)
        rms_norm_triton.backward(x, x, r, weight, False)
    for kernels, caps, count in ((forward, FORWARD_CAPS, 1), (backward, BACKWARD_CAPS, 2)):
        assert len(kernels) == count
        for kernel in kernels:
            check(kernel, cap_for(hidden, caps, target))


@every_target
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_cross_entropy(target, vocabulary):
    shapes = slices(vocabulary)
    shapes.append(
        (vocabulary, vocabulary)
    )  # unpadded, in the strided buffer of the fused linear op
    for held, columns in shapes:
        logits = _logits_buffer(ROWS, held, torch.bfloat16, torch.device("cpu"))
        labels = torch.zeros(ROWS, dtype=torch.int64)
        lse, scale = torch.empty(2, ROWS)
        with compiling(target) as statistics:
            cross_entropy_triton.statistics(logits, labels, columns)
        with compiling(target) as gradient:
            cross_entropy_triton.gradient_(logits, labels, lse, scale, columns)
        assert len(statistics) == len(gradient) == 1
        check(statistics[0], cap(STATISTICS_CAPS, target))
        check(gradient[0], cap(GRADIENT_CAPS, target))
