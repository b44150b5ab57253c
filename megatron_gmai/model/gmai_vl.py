"""GMAI-VL on one pipeline stage: vision tower and projector, merge, decoder layers, loss."""

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_gmai.config import Config
from megatron_gmai.model.attention import Segments
from megatron_gmai.model.language import LanguageModel
from megatron_gmai.model.projector import Projector
from megatron_gmai.model.transformer import language_transformer_config
from megatron_gmai.model.vision_parallel import encode_shared
from megatron_gmai.model.vit import VisionTower
from megatron_gmai.runtime.device import Device
from megatron_gmai.runtime.groups import Groups

VISION_PREFIXES = ("vision_model.", "projector.")


class GMAIVL(MegatronModule):
    """What this rank holds of the model: everything that its pipeline stage runs."""

    def __init__(self, config: Config, device: Device, groups: Groups) -> None:
        language = config.model.language
        super().__init__(language_transformer_config(config, device))
        self.groups = groups
        # Names that Megatron's schedule and gradient finalisation look for.
        self.pre_process, self.post_process = groups.is_first_stage, groups.is_last_stage
        self.share_embeddings_and_output_weights = False
        self.model_type = ModelType.encoder_or_decoder
        self.image_token_count = config.model.vision.tokens_per_image
        if groups.is_first_stage:
            self.vision_model = VisionTower(config.model.vision, device, groups)
            self.projector = Projector(config.model, device)
            self._untie_vision_from_tensor_parallelism()
        self.language_model = LanguageModel(
            self.config, language, config.train.loss_implementation, device, groups
        )
        self._freeze(config)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Called by the pipeline schedule with what the previous stage sent."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.language_model.decoder.set_input_tensor(tensor)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        segments: Segments,
        labels: Tensor,
        pixel_values: Tensor,
        image_starts: Tensor,
    ) -> Tensor:
        """One micro-batch: hidden states for the next stage, or fp32 [T] losses on the last.

        tokens, position_ids, labels int64 [T]; pixel_values uint8 [N, 3, I, I];
        image_starts int64 [N], where each image's placeholder tokens begin.
        """
        embeddings = None
        if self.pre_process:
            embeddings = self.merge(
                self.language_model.embed(tokens[None]), self.encode(pixel_values), image_starts
            )
            if self.config.sequence_parallel:
                embeddings = scatter_to_sequence_parallel_region(embeddings, group=self.groups.tp)
        hidden = self.language_model(embeddings, position_ids, segments)
        return self.language_model.loss(hidden, labels) if self.post_process else hidden

    def encode(self, pixel_values: Tensor) -> Tensor | None:
        """uint8 [N, 3, I, I] -> token embeddings [N, P, H]; None if nothing here can matter.

        With a trained tower the encoder runs even without images, on a blank one whose features
        are not used: gradient reduction expects every parameter to take part.
        """
        if pixel_values.size(0) == 0 and not self._vision_trains():
            return None
        context = nullcontext() if self._vision_trains() else torch.no_grad()
        with context:
            return encode_shared(self._project_features, pixel_values, self.groups.tp)

    def merge(self, embeddings: Tensor, features: Tensor | None, image_starts: Tensor) -> Tensor:
        """Put image features [N, P, H] in the place of their tokens in [T, 1, H]."""
        if features is None:
            return embeddings
        offsets = torch.arange(self.image_token_count, device=image_starts.device)
        positions = (image_starts[:, None] + offsets).flatten()  # [N · P]
        flat = features.flatten(0, 1).unsqueeze(1).to(embeddings.dtype)  # [N · P, 1, H]
        return embeddings.index_copy(0, positions, flat)

    def _project_features(self, pixels: Tensor) -> Tensor:
        trains = any(p.requires_grad for p in self.vision_model.parameters())
        with nullcontext() if trains else torch.no_grad():
            features = self.vision_model(pixels)
        return self.projector(features)

    def _vision_trains(self) -> bool:
        return any(p.requires_grad for _, p in self.vision_parameters())

    def vision_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Parameters of the tower and the projector, which every first-stage rank has whole."""
        return [(n, p) for n, p in self.named_parameters() if n.startswith(VISION_PREFIXES)]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """What a checkpoint holds of this rank, under the canonical names.

        Tower and projector are written by one rank only, though every first-stage rank has them.
        """
        state = self.language_model.sharded_state_dict(
            f"{prefix}language_model.", sharded_offsets, metadata
        )
        replica = (0, self.groups.tp.rank(), self.groups.dp_cp.rank())
        # The linears' extra state is empty, and reading it back would unpickle it.
        state = {k: v for k, v in state.items() if not k.endswith("_extra_state")}
        for name, parameter in self.vision_parameters():
            state[prefix + name] = ShardedTensor.from_rank_offsets(
                prefix + name, parameter, replica_id=replica
            )
        # The padding of the vocabulary depends on the layout; what is padded is never read.
        head = state.get(f"{prefix}language_model.output_layer.weight")
        if head is not None:
            head.allow_shape_mismatch = True
        return state

    def _untie_vision_from_tensor_parallelism(self) -> None:
        # Megatron's linears mark their weights as slices of a tensor-parallel weight; here they are
        # replicas, and the gradient norm must count them once.
        for _, parameter in self.vision_parameters():
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]

    def _freeze(self, config: Config) -> None:
        frozen = {
            "vision_model": config.train.freeze_vit,
            "projector": config.train.freeze_projector,
            "language_model": config.train.freeze_llm,
        }
        for name, module in self.named_children():
            module.requires_grad_(not frozen.get(name, False))
