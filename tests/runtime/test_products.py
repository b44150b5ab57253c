"""oneDNN in the place of aten::mm: the same products, and torch's own afterwards."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_gmai.runtime import products

ONEDNN = "mkldnn::_linear_pointwise"
LARGE = 256  # its cube is `products.SMALLEST`
near = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-3)  # terms in another order

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


def operators(left: Tensor, right: Tensor) -> tuple[Tensor, set[str]]:
    """The product, and what torch ran for it."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        out = left @ right
    return out, {event.key for event in seen.key_averages()}


def test_large_products_go_to_onednn_and_back_to_torch() -> None:
    left, right = torch.randn(LARGE, LARGE), torch.randn(LARGE, LARGE)
    before = left @ right
    library = products.use_onednn()
    try:
        found, names = operators(left, right)
    finally:
        library._destroy()
    assert ONEDNN in names
    near(found, before)
    after, names = operators(left, right)
    assert ONEDNN not in names and torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(LARGE, LARGE + 8, LARGE + 16), (3, 4, 5), (0, 4, 5), (3, 0, 5)])
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_products_of_any_kind_are_those_of_torch(
    dtype: torch.dtype, shape: tuple[int, int, int], turned: tuple[bool, bool]
) -> None:
    rows, inner, columns = shape
    sides = [(rows, inner), (inner, columns)]
    left, right = (
        torch.randn(side[::-1]).mul(4).to(dtype).T if is_turned else torch.randn(side).to(dtype)
        for side, is_turned in zip(sides, turned, strict=True)
    )
    found = products.product(left, right)
    assert found.dtype is dtype and found.is_contiguous()
    compare = near if dtype is torch.float32 else torch.testing.assert_close
    compare(found, left @ right)


def test_gradients_pass_through_it() -> None:
    left, right = (torch.randn(LARGE, LARGE, requires_grad=True) for _ in range(2))
    library = products.use_onednn()
    try:
        (left @ right).sum().backward()
    finally:
        library._destroy()
    expected = right.detach().double().sum(1).expand(LARGE, LARGE)
    near(left.grad, expected.float())
