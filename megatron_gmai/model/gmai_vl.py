"""One chunk of GMAI-VL: vision tower and projector, merge, decoder layers, loss."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_gmai.config import Config
from megatron_gmai.layout import Chunk
from megatron_gmai.model.attention import Segments
from megatron_gmai.model.language import LanguageModel
from megatron_gmai.model.lora import add_adapters, drawing_the_same_again
from megatron_gmai.model.projector import Projector
from megatron_gmai.model.transformer import language_transformer_config
from megatron_gmai.model.vision_parallel import encode_shared, gather_features
from megatron_gmai.model.vit import VisionTower
from megatron_gmai.runtime.world import World
from megatron_gmai.weights import weights


def build_chunks(config: Config, world: World) -> list["GMAIVL"]:
    """What this rank holds of the model, in the order of the model; weights are not filled yet."""
    return [GMAIVL(config, chunk, world) for chunk in world.chunks]


class GMAIVL(MegatronModule):
    """A chunk: a run of decoder layers, with the loss if it is the last, and with the towers if it
    is the first (with `--vision-phase all-ranks` if it is the first of its rank).

    Most runs have one chunk a rank; with virtual pipeline stages Megatron's interleaved schedule
    runs several in turn.
    """

    def __init__(self, config: Config, chunk: Chunk, world: World) -> None:
        super().__init__(language_transformer_config(config, chunk, world))
        self.chunk, self.groups = chunk, world.groups
        self.table = weights(config.model, config.lora)
        # Names that Megatron's schedule and gradient finalisation look for.
        self.pre_process, self.post_process = chunk.is_first, chunk.is_last
        self.vp_stage = chunk.virtual
        self.share_embeddings_and_output_weights = config.model.language.tie_word_embeddings
        self.model_type = ModelType.encoder_or_decoder
        self.image_token_count = config.model.vision.tokens_per_image
        self.images_at_once = config.train.vit_micro_batch_size
        self.recompute_vision = config.train.recompute_vit
        if chunk.has_vision:
            self.vision_model = VisionTower(config.model.vision, world)
            self.projector = Projector(config.model, world.device)
            tower, alone = self.vision_model, world.groups.solo
            add_adapters("vision_model", tower.decoder.layers, config.lora, tower.config, alone)
            self._mark_vision_parameters(config.parallel.use_distributed_optimizer)
        self.language_model = LanguageModel(
            self.config, config.model.language, config.train.loss_implementation, chunk, world
        )
        layers = self.language_model.decoder.layers
        add_adapters("language_model", layers, config.lora, self.config, world.groups.tp)
        self._freeze(config)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Called when gradients are finished, where the weights are tied: first and last pipeline
        stage sum those of their copies."""
        if self.pre_process:
            return self.language_model.embedding.word_embeddings.weight
        return self.language_model.output_layer.weight

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
        first_image: int = 0,
        features: Tensor | None = None,
    ) -> Tensor:
        """One micro-batch: hidden states for the next chunk, or fp32 [T] losses in the last.

        tokens, position_ids, labels int64 [T], of this context-parallel rank; segments of all
        ranks' tokens; pixel_values uint8 [N, 3, I, I]; image_starts int64 [N], where each image's
        placeholder tokens begin, counted from this rank's first token; first_image, the step's
        images before these, says who encodes which (`ImageShare`). features [share, P, H] are those
        of this rank's images where they were encoded ahead; then pixel_values are not looked at.
        """
        embeddings = None
        if self.pre_process:
            if features is None:
                images = self.encode(pixel_values, first_image)
            else:
                images = gather_features(features, len(image_starts), first_image, self.groups)
            embeddings = self.merge(self.language_model.embed(tokens[None]), images, image_starts)
            if self.config.sequence_parallel:
                embeddings = scatter_to_sequence_parallel_region(embeddings, group=self.groups.tp)
        hidden = self.language_model(embeddings, position_ids, segments)
        return self.language_model.output_layer(hidden, labels) if self.post_process else hidden

    def encode(self, pixel_values: Tensor, first_image: int = 0) -> Tensor | None:
        """uint8 [N, 3, I, I] -> token embeddings [N, P, H]; None if nothing here can matter.

        With a trained tower the encoder runs even without images, on a blank one whose features
        are not used: gradient reduction expects every parameter to take part.
        """
        if pixel_values.size(0) == 0 and not self.vision_trains():
            return None
        return encode_shared(self.encode_own, pixel_values, first_image, self.groups)

    def encode_own(self, pixels: Tensor) -> Tensor:
        """[n, 3, I, I] -> [n, P, H], all of them on this rank, without a graph if none is needed.

        At most `--vit-micro-batch-size` images are in the tower at once.
        """
        with nullcontext() if self.vision_trains() else torch.no_grad():
            return self._project_features(pixels)

    def merge(self, embeddings: Tensor, features: Tensor | None, image_starts: Tensor) -> Tensor:
        """Put image features [N, P, H] in the place of their tokens in [T, 1, H]."""
        if features is None:
            return embeddings
        offsets = torch.arange(self.image_token_count, device=image_starts.device)
        positions = (image_starts[:, None] + offsets).flatten()  # [N · P]
        flat = features.flatten(0, 1).unsqueeze(1).to(embeddings.dtype)  # [N · P, 1, H]
        if self.groups.cp.size() == 1:
            return embeddings.index_copy(0, positions, flat)
        # Tokens of other context-parallel ranks go to a spare row, which is cut off again: choosing
        # the own ones by a mask would make the host wait for the device to count them.
        spare = embeddings.size(0)
        is_own = (positions >= 0) & (positions < spare)
        with_spare = torch.cat([embeddings, embeddings.new_zeros(1, *embeddings.shape[1:])])
        return with_spare.index_copy(0, torch.where(is_own, positions, spare), flat)[:spare]

    def _project_features(self, pixels: Tensor) -> Tensor:
        if any(p.requires_grad for p in self.vision_model.parameters()):
            return self._in_turns(lambda part: self.projector(self.vision_model(part)), pixels)
        with torch.no_grad():  # a frozen tower never runs again
            parts = pixels.split(self.images_at_once)
            features = torch.cat([self.vision_model(part) for part in parts])
        return self._in_turns(self.projector, features)

    def _in_turns(self, run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Run a bounded number of images at a time.

        Where there are more, or with `--recompute-vit`, only their features are kept and `run` runs
        again in the backward pass, so that many images do not set the memory peak.
        """
        parts = images.split(self.images_at_once)
        if len(parts) == 1 and not self.recompute_vision:
            return run(images)
        # Not reentrant: one backward pass, so each gradient is complete when its hook runs and
        # its bucket may be reduced.
        again = partial(checkpoint, run, use_reentrant=False, context_fn=drawing_the_same_again)
        return torch.cat([again(part) for part in parts])

    def vision_trains(self) -> bool:
        """Whether the tower or the projector is trained."""
        return any(p.requires_grad for _, p in self.vision_parameters())

    def vision_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Parameters of the tower and the projector, which every rank that has them has whole."""
        towers = ("vision_model.", "projector.")
        return [(n, p) for n, p in self.named_parameters() if n.startswith(towers)]

    def _mark_vision_parameters(self, sharded_optimizer: bool) -> None:
        """Tell Megatron that these are whole copies, whose gradients are summed over all ranks that
        have one (see `build_groups`)."""
        for _, parameter in self.vision_parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            # The gradient norm counts parameters marked False on the first TP rank only, and those
            # that are "shared" not at all: copies count once. A sharded optimizer holds another
            # part on each of these ranks.
            parameter.tensor_model_parallel = sharded_optimizer  # type: ignore[attr-defined]
            is_copy = not (sharded_optimizer or self.pre_process)
            parameter.shared = is_copy  # type: ignore[attr-defined]

    def _freeze(self, config: Config) -> None:
        frozen = {
            "vision_model": config.train.freeze_vit,
            "projector": config.train.freeze_projector,
            "language_model": config.train.freeze_llm,
        }
        for name, module in self.named_children():
            module.requires_grad_(not frozen[name])
            if name in config.lora.towers:
                for inside, parameter in module.named_parameters():
                    parameter.requires_grad_(".lora." in inside)
