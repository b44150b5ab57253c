"""RMSNorm agrees with float64 in value and gradients."""

import pytest
import torch
from numerics import TOLERANCE, assert_close, every_dtype, every_implementation, grad, leaf, running

from gmai_kernels import rms_norm, use_implementation

EPS = 1e-5
# One row, one warp, not a power of two, odd, wide, and the widest.
SHAPES = ((1, 64), (19, 100), (5, 1000), (3, 1001), (9, 4096), (2, 8200), (3, 16384))


def inputs(rows: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, weight, dy."""
    torch.manual_seed(rows * hidden)
    x, dy = (torch.randn(rows, hidden).to(dtype) for _ in range(2))
    return x, (1 + 0.1 * torch.randn(hidden)).to(dtype), dy


def in_float64(x, weight, dy) -> tuple[torch.Tensor, ...]:
    """y, dx, dweight of the reference."""
    x, weight = leaf(x, torch.float64), leaf(weight, torch.float64)
    with use_implementation("reference"):
        y = rms_norm(x, weight, EPS)
    y.backward(dy.double())
    return y, grad(x), grad(weight)


@every_implementation
@every_dtype
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
def test_value_and_gradients(implementation, dtype, rows, hidden):
    x, weight, dy = inputs(rows, hidden, dtype)
    reference = in_float64(x, weight, dy)
    x, weight = leaf(x), leaf(weight)
    with running(implementation):
        y = rms_norm(x, weight, EPS)
        y.backward(dy)
    assert y.dtype == grad(x).dtype == grad(weight).dtype == dtype
    assert_close(y, reference[0], TOLERANCE[dtype], "y")
    assert_close(grad(x), reference[1], TOLERANCE[dtype], "dx")
    assert_close(grad(weight), reference[2], TOLERANCE[dtype], "dweight")


@every_dtype
def test_many_rows_cost_no_digits_on_a_cpu(dtype):
    x, weight, dy = inputs(20000, 64, dtype)
    y64, dx64, dweight64 = in_float64(x, weight, dy)
    x, weight = leaf(x), leaf(weight)
    y = rms_norm(x, weight, EPS)
    y.backward(dy)
    assert_close(y, y64, TOLERANCE[dtype], "y")
    assert_close(grad(x), dx64, TOLERANCE[dtype], "dx")
    assert_close(grad(weight), dweight64, TOLERANCE[dtype], "dweight")


@every_implementation
def test_rows_may_be_strided_and_leading_dimensions_many(implementation):
    wide, weight, dy = inputs(6, 96, torch.float32)
    weight = weight[:48].clone()
    x, dy = wide.view(2, 3, 96)[..., :48], dy.view(2, 3, 96)[..., 48:]
    found, expected = leaf(x), leaf(x.contiguous())
    found.data = x  # a leaf with the strides of the slice
    with running(implementation):
        y = rms_norm(found, weight, EPS)
        y.backward(dy)
        rms_norm(expected, weight, EPS).backward(dy.contiguous())
    assert y.shape == (2, 3, 48) and y.is_contiguous()
    assert torch.equal(grad(found), grad(expected))


@every_implementation
def test_gradient_of_a_sum_may_be_expanded(implementation):
    x, weight, _ = inputs(4, 80, torch.float32)
    reference = in_float64(x, weight, torch.ones(4, 80))
    x, weight = leaf(x), leaf(weight)
    with running(implementation):
        rms_norm(x, weight, EPS).sum().backward()
    assert_close(grad(x), reference[1], 2e-6, "dx")
    assert_close(grad(weight), reference[2], 2e-6, "dweight")


@every_implementation
def test_a_frozen_weight_gets_no_gradient(implementation):
    x, weight, dy = inputs(5, 128, torch.float32)
    trained, frozen = leaf(x), leaf(x)
    with running(implementation):
        rms_norm(trained, leaf(weight), EPS).backward(dy)
        rms_norm(frozen, weight, EPS).backward(dy)
    assert weight.grad is None
    assert_close(grad(frozen), grad(trained), 2e-6, "dx")


@every_implementation
def test_two_runs_agree_bitwise(implementation):
    results = []
    for _ in range(2):
        x, weight, dy = inputs(40, 256, torch.bfloat16)
        x, weight = leaf(x), leaf(weight)
        with running(implementation):
            rms_norm(x, weight, EPS).backward(dy)
        results.append((grad(x), grad(weight)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


X, W = torch.ones(4, 64), torch.ones(64)


@every_implementation
@pytest.mark.parametrize(
    ("argument", "x", "weight", "eps"),
    [
        ("x: dtype", X.int(), W.int(), EPS),
        ("x: dtype", X.double(), W.double(), EPS),
        ("x: shape", X[:0], W, EPS),
        ("x: shape", torch.tensor(1.0), W, EPS),
        ("weight: dtype", X, W.bfloat16(), EPS),
        ("weight: shape", X, W[:32], EPS),
        ("weight: strides", X, torch.ones(128)[::2], EPS),
        ("weight: device", X, torch.ones(64, device="meta"), EPS),
        ("eps", X, W, 0.0),
    ],
)
def test_wrong_input_is_named(implementation, argument, x, weight, eps):
    with running(implementation), pytest.raises(ValueError, match=f"^{argument}"):
        rms_norm(x, weight, eps)


def test_a_row_too_wide_for_the_kernel_is_refused():
    with running("triton"), pytest.raises(ValueError, match="^x: hidden size 16385"):
        rms_norm(torch.ones(1, 16385), torch.ones(16385), EPS)
