"""The guard passes correct kernels and catches each planted fault."""

import pytest
import torch
import triton
import triton.language as tl
from sample_kernels import row_norm, scale, scale_kernel

from gmai_kernels.testing.guard import GuardError, guarded


@triton.jit
def even_kernel(x_ptr, y_ptr, stride, n, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Copies a row per program; EVEN promises that BLOCK divides n."""
    row = tl.program_id(0)
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = None if EVEN else cols < n
        x = tl.load(x_ptr + row * stride + cols, mask=mask)
        tl.store(y_ptr + row * n + cols, x, mask=cols < n)


@triton.jit
def shifted_kernel(x_ptr, y_ptr, n, load_shift, store_shift, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols + load_shift, mask=cols < n)
    tl.store(y_ptr + cols + store_shift, x, mask=cols < n)


@triton.jit
def overlapping_kernel(x_ptr, y_ptr, step, BLOCK: tl.constexpr):
    """Program p owns elements [p * step, p * step + BLOCK): no race only if step >= BLOCK."""
    cols = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(y_ptr + cols, tl.load(x_ptr + cols))


@triton.jit
def shared_sum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + cols), axis=0))


@triton.jit
def accumulate_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(y_ptr + cols, tl.load(y_ptr + cols) + tl.load(x_ptr + cols))


@triton.jit
def collapse_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(y_ptr + cols // 2, tl.load(x_ptr + cols))


def copy_rows(x: torch.Tensor, even: bool) -> torch.Tensor:
    y = x.new_empty(x.shape)
    even_kernel[(x.shape[0],)](x, y, x.stride(0), x.shape[1], EVEN=even, BLOCK=32)
    return y


def shift(x: torch.Tensor, load: int = 0, store: int = 0) -> torch.Tensor:
    y = torch.empty_like(x)
    shifted_kernel[(1,)](x, y, len(x), load, store, BLOCK=64)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_correct_kernels_pass_and_keep_their_results(dtype):
    x = torch.randn(5, 100, dtype=dtype)
    with guarded():
        assert torch.equal(scale(x, 2.0), x * 2)
        assert torch.equal(copy_rows(x[:, :70], even=False), x[:, :70])
        torch.testing.assert_close(row_norm(x), x.double().norm(dim=1).float())


def test_in_place_is_no_race():
    x = torch.arange(256.0)
    with guarded():
        overlapping_kernel[(4,)](x, x, 64, BLOCK=64)


@pytest.mark.parametrize("offset", [-1, 1, 10**6])
def test_out_of_bounds_load_is_caught(offset):
    with (
        pytest.raises(GuardError, match="shifted_kernel, program 0: loads .* bounds of x_ptr"),
        guarded(),
    ):
        shift(torch.ones(50), load=offset)


@pytest.mark.parametrize("offset", [-1, 1, 10**6])
def test_out_of_bounds_store_is_caught(offset):
    with pytest.raises(GuardError, match="stores .* out of bounds of y_ptr"), guarded():
        shift(torch.ones(50), store=offset)


def test_an_access_that_lands_in_another_argument_is_caught():
    both = torch.ones(2, 64)
    with (
        pytest.raises(GuardError, match="64 element.* bounds of x_ptr: from element 64 to 127"),
        guarded(),
    ):
        shifted_kernel[(1,)](both[0], both[1], 64, 64, 0, BLOCK=64)


def test_wrong_even_flag_is_caught():
    with (
        pytest.raises(GuardError, match="out of bounds of x_ptr: from element 50 to 63"),
        guarded(),
    ):
        copy_rows(torch.ones(1, 50), even=True)


def test_wrong_even_flag_is_caught_in_the_padding_of_strided_rows():
    with (
        pytest.raises(GuardError, match="even_kernel, program 0: .* bounds of x_ptr"),
        guarded(),
    ):
        copy_rows(torch.ones(2, 64)[:, :50], even=True)


def test_unwritten_tail_is_caught():
    with (
        pytest.raises(GuardError, match="y_ptr of scale_kernel: 36 of 100 elements never written"),
        guarded(),
    ):
        x = torch.ones(100)
        y = torch.empty_like(x)
        scale_kernel[(1,)](x, y, 2.0, 64, BLOCK=64)


def test_reading_what_nothing_wrote_is_caught():
    with pytest.raises(GuardError, match="reads 32 unwritten element.* of y_ptr"), guarded():
        accumulate_kernel[(1,)](torch.ones(32), torch.empty(32), BLOCK=32)


def test_memory_that_torch_wrote_counts_as_written():
    with guarded():
        y = torch.empty(32).fill_(1.0)
        accumulate_kernel[(1,)](torch.ones(32), y, BLOCK=32)
        accumulate_kernel[(1,)](torch.ones(32), torch.zeros(32), BLOCK=32)


@pytest.mark.parametrize("programs", [2, 5])
def test_two_programs_writing_one_element_is_caught(programs):
    x, y = torch.ones(2, 1000)
    with (
        pytest.raises(GuardError, match="program 1: writes 32 element.* program 0 also wrote"),
        guarded(),
    ):
        overlapping_kernel[(programs,)](x, y, 32, BLOCK=64)


def test_reading_what_another_program_writes_is_caught():
    x = torch.ones(200)
    with (
        pytest.raises(GuardError, match="program 1: reads 32 element.* program 0 also wrote"),
        guarded(),
    ):
        overlapping_kernel[(2,)](x, x, 32, BLOCK=64)


def test_writing_what_another_program_has_read_is_caught():
    x = torch.ones(256)
    with (
        pytest.raises(GuardError, match="program 1: writes 64 .* program 0 also reads"),
        guarded(),
    ):
        overlapping_kernel[(2,)](x[64:], x, 64, BLOCK=64)


def test_two_lanes_writing_one_element_is_caught():
    x, y = torch.ones(2, 64)
    with pytest.raises(GuardError, match="stores twice to one element of y_ptr"), guarded():
        collapse_kernel[(1,)](x, y, BLOCK=64)


def test_atomics_are_refused():
    with pytest.raises(GuardError, match="atomic"), guarded():
        shared_sum_kernel[(2,)](torch.ones(128), torch.zeros(1), BLOCK=64)
