"""The vision tower: CLIP ViT, features of the last layer but one, class token dropped."""

import torch
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from torch import Tensor

from megatron_gmai.config import CLIP_MEAN, CLIP_STD, VisionConfig
from megatron_gmai.model.norm import layer_norm_for
from megatron_gmai.model.transformer import vision_layer_spec, vision_transformer_config
from megatron_gmai.runtime.world import World


class VisionTower(CLIPViTModel):
    """Images in, one feature vector per patch out.

    It is built on a group of this rank alone: each rank of the first stage encodes other images.
    """

    def __init__(self, vision: VisionConfig, world: World) -> None:
        device, implementation = world.device, world.implementation
        with device.torch_device:  # Megatron makes the patch embedding on the CPU otherwise
            super().__init__(
                vision_transformer_config(vision, device, implementation),
                vision_layer_spec(implementation),
                ln_pre_impl=layer_norm_for(implementation),
                patch_dim=vision.patch_size,
                img_h=vision.image_size,
                img_w=vision.image_size,
                pg_collection=world.groups.for_vision(),
            )
        for parameter in self.parameters():  # ... and in fp32
            parameter.data = parameter.data.to(device.dtype)
        shape = (1, 3, 1, 1)
        # Plain attributes: constants belong neither in a checkpoint nor among the parameters.
        self.mean = torch.tensor(CLIP_MEAN, device=device.torch_device).view(shape) * 255
        self.std = torch.tensor(CLIP_STD, device=device.torch_device).view(shape) * 255

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, I, I] -> [N, P, Hv] with P patches an image."""
        normalised = (pixels.float() - self.mean) / self.std
        features = super().forward(normalised.to(self.conv1.weight.dtype))
        return features[:, self.class_token_len :]
