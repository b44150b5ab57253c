"""The traffic counter counts exactly what moves."""

import pytest
import torch
import triton
import triton.language as tl
from sample_kernels import row_norm, scale

from gmai_kernels.testing.disguise import looks_like_gpu
from gmai_kernels.testing.traffic import counted


@triton.jit
def two_pass_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Reads its row twice: what a careless softmax does."""
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    peak = tl.max(tl.load(x_ptr + row * n + cols, mask=cols < n, other=-float("inf")), axis=0)
    x = tl.load(x_ptr + row * n + cols, mask=cols < n)
    tl.store(y_ptr + row * n + cols, x - peak, mask=cols < n)


def moved(function) -> tuple[int, int]:
    """(bytes loaded, bytes stored) by the torch operations of a call."""
    with counted() as traffic:
        function()
    assert not any(entry.is_kernel for entry in traffic.entries)
    return sum(e.loaded for e in traffic.entries), sum(e.stored for e in traffic.entries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_lanes_move_nothing(dtype):
    x = torch.randn(100, dtype=dtype)  # two programs of 64 lanes
    with counted() as traffic:
        scale(x, 2.0)
    (entry,) = [e for e in traffic.entries if e.is_kernel]
    assert entry.name == "scale_kernel"
    assert (entry.loaded, entry.stored) == (100 * dtype.itemsize, 100 * dtype.itemsize)


def test_a_second_read_of_the_row_is_seen():
    x = torch.randn(8, 100, dtype=torch.bfloat16)
    with counted() as traffic:
        two_pass_kernel[(8,)](x, torch.empty_like(x), 100, BLOCK=128)
    assert traffic.kernels / x.numel() == 6.0


def test_launches_are_counted_one_by_one():
    with counted() as traffic:
        scale(torch.ones(64), 2.0)
        row_norm(torch.ones(2, 64))
    kernels = [(e.name, e.total) for e in traffic.entries if e.is_kernel]
    assert kernels == [("scale_kernel", 512), ("row_norm_kernel", 520)]


def test_torch_operations_count_inputs_and_outputs_once():
    a, b, c = torch.ones(4, 8), torch.ones(8, 16), torch.ones(4, 16)
    index = torch.zeros(4, 1, dtype=torch.int64)
    assert moved(lambda: a @ b) == (4 * (32 + 128), 4 * 64)
    assert moved(lambda: torch.mm(a, b, out=c)) == (4 * (32 + 128), 4 * 64)
    assert moved(lambda: c.addmm_(a, b)) == (4 * (32 + 128 + 64), 4 * 64)
    assert moved(lambda: c.add_(1.0)) == (4 * 64, 4 * 64)
    assert moved(lambda: c.fill_(1.0)) == (0, 4 * 64)
    assert moved(lambda: c[:2].copy_(c[2:])) == (4 * 32, 4 * 32)
    assert moved(lambda: c.gather(1, index)) == (4 * 4 + 8 * 4, 4 * 4)
    assert moved(lambda: a[:, :1].expand(4, 100).sum()) == (4 * 4, 4)
    assert moved(lambda: a.t().reshape(8, 4).view(8, 4)[1:]) == (0, 0)
    assert moved(lambda: torch.empty_like(a)) == (0, 0)


def test_the_disguise_computes_mixed_products_and_ends():
    left, right = torch.randn(2, 8, 8).bfloat16()
    total = torch.zeros(8, 8)
    with looks_like_gpu(), counted() as traffic:
        assert left.is_cuda and left.device.type == "cuda"
        assert torch.zeros(2, device=left.device).is_cuda
        first = torch.mm(left, right, out_dtype=torch.float32)
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    torch.testing.assert_close(first, left.float() @ right.float())
    torch.testing.assert_close(total, first)
    products = [e.total for e in traffic.entries if "mm" in e.name]
    assert products == [2 * 128 + 256, 2 * 128 + 512]
    assert not left.is_cuda and left.device.type == "cpu"
