"""Rotation of query and key: Megatron's formula, in fewer passes."""

import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

from megatron_gmai.model.rotary import rotate


def test_output_and_gradient_are_those_of_megatrons_formula() -> None:
    angles = torch.randn(7, 1, 1, 4, dtype=torch.float64)
    # A slice of a wider tensor, as the key is one of the joint projection.
    x = torch.randn(7, 3, 20, dtype=torch.float64)[..., 2:10].requires_grad_()
    gradient = torch.randn(7, 3, 8, dtype=torch.float64)
    found = rotate(x, angles[:, 0].cos(), angles[:, 0].sin())
    expected = _apply_rotary_pos_emb_bshd(x[:, None], torch.cat([angles, angles], dim=-1))[:, 0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, x, gradient), torch.autograd.grad(expected, x, gradient)
    )
