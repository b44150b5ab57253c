"""Memory of images on a rank: of a micro-batch that passes, and of a whole step's with
`--vision-phase all-ranks` (training/encode_ahead.py).
"""

from dataclasses import dataclass

from megatron_gmai.config import Config, TrainConfig
from megatron_gmai.layout import encodes_ahead
from megatron_gmai.planner.share import HALF, SINGLE, Share


def vision_trains(train: TrainConfig) -> bool:
    """Whether features need gradients."""
    return not (train.freeze_vit and train.freeze_projector)


def recomputes_vision(train: TrainConfig, images: int) -> bool:
    """Whether the tower runs again in the backward pass."""
    return train.recompute_vit or images > train.vit_micro_batch_size


def feature_bytes(share: Share, images: int) -> float:
    """Token embeddings of so many images."""
    model = share.config.model
    return HALF * images * model.vision.tokens_per_image * model.language.hidden_size


def kept_bytes(share: Share, images: int) -> float:
    """What stays of encoded images until their backward pass, beside their features."""
    vision, train = share.config.model.vision, share.config.train
    if not vision_trains(train):
        return 0.0
    if not recomputes_vision(train, images):
        return vision_bytes(share, images)
    if train.freeze_vit:
        return HALF * images * vision.tokens_per_image * vision.hidden_size
    return images * 3 * vision.image_size**2  # pixels, a byte each


def vision_bytes(share: Share, images: int) -> float:
    """What tower and projector keep of so many images."""
    config = share.config
    vision, patches = config.model.vision, config.model.vision.tokens_per_image
    projector = 2 * feature_bytes(share, images) + HALF * images * patches * vision.hidden_size
    if config.train.freeze_vit:
        return projector
    tokens = images * (patches + 1)
    layer = _layer_bytes(config)
    if config.lora.vit_use_lora:  # what comes before the first adapter needs no gradient
        return projector + vision.layers_used * tokens * layer
    start = HALF * images * 3 * vision.image_size**2 + 2 * HALF * tokens * vision.hidden_size
    return projector + start + vision.layers_used * tokens * layer


def _layer_bytes(config: Config) -> float:
    """What a layer of the tower keeps of a token."""
    vision, lora = config.model.vision, config.lora
    hidden, ffn = HALF * vision.hidden_size, HALF * vision.ffn_hidden_size
    statistics = 4 * SINGLE + SINGLE * vision.num_attention_heads
    if not lora.vit_use_lora:
        return 8 * hidden + 3 * ffn + statistics
    # Two sums, queries, keys, values, attention's output (which is the input of proj), and two
    # factors of the quick GELU; the other inputs of products are kept for adapters only.
    kept: float = 6 * hidden + 2 * ffn + statistics
    proj = hidden if lora.lora_dropout else 0.0
    inputs = {"qkv": hidden, "proj": proj, "fc1": hidden, "fc2": ffn}
    for target in lora.targets_in("vision_model"):  # of A, with dropout's mask, and of B
        dropped = inputs[target] / HALF if lora.lora_dropout else 0.0
        kept += inputs[target] + dropped + HALF * lora.lora_rank
    return kept


def backward_bytes(share: Share, images: int) -> float:
    """What the tower's backward pass makes again of images of which features alone were kept."""
    train = share.config.train
    if not (vision_trains(train) and recomputes_vision(train, images)):
        return 0.0
    turn = min(images, train.vit_micro_batch_size)
    return vision_bytes(share, turn) + feature_bytes(share, turn)


@dataclass(frozen=True)
class Ahead:
    """Bytes of a step's images that are encoded before its first micro-batch, on one rank."""

    kept: float = 0.0  # through the whole step
    leaf: float = 0.0  # features of one micro-batch; as much again for their gradients
    gathered: float = 0.0  # features, or their gradients, of all pipeline ranks of the column
    before: float = 0.0  # the first micro-batch, at most
    after: float = 0.0  # the last one, in the backward pass of what was encoded

    @classmethod
    def of(cls, share: Share, stage: int) -> "Ahead":
        config, layout = share.config, share.layout
        if not encodes_ahead(config.parallel):
            return cls()
        train, images = config.train, share.step_images
        trains, own = vision_trains(train), feature_bytes(share, images)
        pixels = 2 * images * 3 * config.model.vision.image_size**2  # one by one, and stacked
        # Features of several turns are copied together.
        before = pixels + own * (2 if recomputes_vision(train, images) else 1)
        after = own + backward_bytes(share, images) if trains else 0.0
        kept = kept_bytes(share, images)
        if stage > 0 or not (share.load.images or trains):
            return cls(kept, before=before, after=after)
        leaf, gathered = feature_bytes(share, share.images), layout.pipeline * own
        leaves = layout.micro_batches(train) * leaf
        before = max(before, pixels + own + gathered + leaves)
        return cls(kept, leaf, gathered, before, after)
