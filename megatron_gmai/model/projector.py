"""From vision features to token embeddings: linear, GELU, linear (LLaVA-1.5)."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu

from megatron_gmai.config import ModelConfig
from megatron_gmai.runtime.device import Device


class Projector(torch.nn.Module):
    """Replicated like the vision tower: each rank projects the images that it encoded."""

    def __init__(self, model: ModelConfig, device: Device) -> None:
        super().__init__()
        linear = partial(torch.nn.Linear, device=device.torch_device, dtype=device.dtype)
        vision, language = model.vision.hidden_size, model.language.hidden_size
        self.linear_fc1 = linear(vision, language)
        self.linear_fc2 = linear(language, language)

    def forward(self, features: Tensor) -> Tensor:  # [N, P, Hv] -> [N, P, H]
        return self.linear_fc2(gelu(self.linear_fc1(features)))
