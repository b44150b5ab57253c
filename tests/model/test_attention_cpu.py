"""Attention over a pack on a CPU against one call a segment, with its gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_gmai.model.attention_cpu import attend_on_cpu

LENGTHS = (5, 1, 9)


def by_segment(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    parts = []
    for q, k, v in zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_attend_to_themselves(causal: bool, dtype: torch.dtype) -> None:
    joined = torch.randn(sum(LENGTHS), 8, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(sum(LENGTHS), 4, 16, dtype=dtype)
    found = []
    for attend in (
        lambda *a: attend_on_cpu(*a, LENGTHS, causal),
        lambda *a: by_segment(*a, causal),
    ):
        joined.grad = None
        out = attend(*joined.split((4, 2, 2), dim=1))  # views, as of the joined projection
        (out * weight).sum().backward()
        found.append((out.detach(), joined.grad))
    rounding = dict(rtol=0.02, atol=0.03) if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(found[0], found[1], **rounding)
