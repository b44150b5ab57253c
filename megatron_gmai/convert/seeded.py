"""Random start weights, the same in every layout and in every program."""

import hashlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_gmai.config import LoraConfig, ModelConfig
from megatron_gmai.weights import weights


class SeededWeights(Mapping[str, Tensor]):
    """Whole random tensors by name, a pure function of seed, name and shape.

    Matrices are normal with standard deviation sqrt(2 / (5 · fan_in)) (Nguyen & Salazar, 2019), in
    the vision tower 1 / sqrt(fan_in) (LeCun et al., 1998). Projections that write to the residual
    stream of L layers are divided by sqrt(2 L).
    """

    def __init__(
        self,
        model: ModelConfig,
        seed: int,
        lora: LoraConfig = LoraConfig(),  # noqa: B008
    ) -> None:
        self.table, self.seed, self.model = weights(model, lora), seed, model

    def __getitem__(self, name: str) -> Tensor:
        shape = self.table[name].shape
        if name.endswith(("bias", ".lora.b")):  # an adapter begins without effect
            return torch.zeros(shape)
        if "norm" in name or "ln_pre" in name:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.empty(shape).normal_(0, self._std(name, shape), generator=generator)

    def _std(self, name: str, shape: tuple[int, ...]) -> float:
        if name == "vision_model.position_embeddings.weight":
            return 0.3  # of the patch embeddings, which have 1
        vision = name.startswith("vision_model.")
        gain = 1.0 if vision else math.sqrt(2 / 5)
        layers = self.model.vision.layers_used if vision else self.model.language.num_layers
        if ".decoder." in name and ("linear_proj" in name or "linear_fc2" in name):
            gain /= math.sqrt(2 * layers)
        return gain / math.sqrt(math.prod(shape[1:]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)
