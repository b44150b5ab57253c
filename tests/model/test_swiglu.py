"""SwiGLU against its formula, with its gradient."""

import torch
from torch.nn.functional import silu

from megatron_gmai.model.swiglu import _SwiGLU


def test_it_is_the_formula_and_so_is_its_gradient() -> None:
    x = torch.randn(5, 1, 12, dtype=torch.float64, requires_grad=True)
    gate, up = x[..., :6], x[..., 6:]
    torch.testing.assert_close(_SwiGLU.apply(x), silu(gate) * up)
    assert torch.autograd.gradcheck(_SwiGLU.apply, x)
