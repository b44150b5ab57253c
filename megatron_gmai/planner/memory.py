"""Memory of a rank, from the shapes that the code saves: bf16 weights, fp32 gradients and masters.

Legend of one micro-batch on one rank: s tokens (of this context-parallel rank), H hidden, D head
size, A heads, G key-value groups, F feed-forward, V vocabulary rows, n images of p tokens.
A dry run (megatron_gmai/dry_run) counts the same from the code itself; the two are compared in
tests/planner.
"""

import functools
import math
from dataclasses import dataclass

from megatron_gmai.config import Config, LoraConfig, ModelConfig, TrainConfig
from megatron_gmai.layout import Chunk, ImageShare, Layout, Recompute, chunks_of_rank
from megatron_gmai.layout import virtual_stages as virtual_stages_of
from megatron_gmai.planner.cost import Load
from megatron_gmai.planner.schedule import order
from megatron_gmai.weights import Weight, local_shape, padded_vocab_size, weights

LOSS_CHUNK = 2048  # tokens whose logits exist at once (gmai_kernels.linear_cross_entropy)
HALF, SINGLE = 2, 4  # bytes


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # at the peak, all that is no state

    @property
    def static(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        return self.static + self.activations


@dataclass(frozen=True)
class Share:
    """One rank's part of a micro-batch."""

    config: Config
    load: Load
    layout: Layout

    @property
    def tokens(self) -> int:  # s
        return self.config.train.micro_batch_size * self.load.length // self.layout.context

    @property
    def scattered(self) -> int:
        """By how much norms and residuals are divided over the TP ranks."""
        return self.layout.tensor if self.config.parallel.sequence_parallel else 1

    @property
    def images(self) -> int:
        """Images that this rank encodes for a micro-batch, blanks included."""
        whole = math.ceil(self.load.images * self.config.train.micro_batch_size)
        return ImageShare(0, self.layout.tensor * self.layout.context).length(whole)


def stage_memory(config: Config, layout: Layout, stage: int, load: Load) -> Memory:
    """The memory of the ranks of a pipeline stage."""
    chunks = chunks_of_rank(config.parallel, config.model.language.num_layers, stage)
    share = Share(config, load, layout)
    held, gradients, optimizer = static_bytes(config, layout, chunks)
    step = max(_passes_peak(share, chunks, stage), _update_peak(config, layout, chunks))
    constant = (SINGLE * config.model.language.max_position_embeddings) * _head(config)
    if layout.tensor > 1 and config.parallel.sequence_parallel:
        constant += HALF * share.tokens * config.model.language.hidden_size  # Megatron's buffer
    return Memory(held, gradients, optimizer, step + constant)


def static_bytes(
    config: Config, layout: Layout, chunks: tuple[Chunk, ...]
) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer state."""
    held = gradients = optimizer = 0.0
    sharded = config.parallel.use_distributed_optimizer
    for weight in weight_table(config.model, config.lora):
        copies = sum(weight.is_in(chunk) for chunk in chunks)
        size = copies * math.prod(local_shape(weight, layout.tensor))
        held += HALF * size
        if is_trained(config, weight):
            gradients += SINGLE * size
            ranks = _copies(weight, layout) if sharded else 1
            optimizer += 3 * SINGLE * size / ranks  # master, two moments
    return held, gradients, optimizer


@functools.lru_cache(maxsize=8)
def weight_table(model: ModelConfig, lora: LoraConfig) -> tuple[Weight, ...]:
    """The weights, kept because a search asks for them thousands of times."""
    return tuple(weights(model, lora).values())


def is_trained(config: Config, weight: Weight) -> bool:
    train = config.train
    if config.lora.llm_use_lora and weight.tower == "language_model":
        return weight.is_adapter
    return not {
        "vision_model": train.freeze_vit,
        "projector": train.freeze_projector,
        "language_model": train.freeze_llm,
    }[weight.tower]


def _copies(weight: Weight, layout: Layout) -> int:
    """Ranks over which its optimizer state is sharded."""
    copies = layout.data * layout.context
    return copies * layout.tensor if weight.tower != "language_model" else copies


def _update_peak(config: Config, layout: Layout, chunks: tuple[Chunk, ...]) -> float:
    """The optimizer's temporaries: a square root of the second moments of one of its two parts."""
    sizes = {True: 0.0, False: 0.0}
    sharded = config.parallel.use_distributed_optimizer
    for weight in weight_table(config.model, config.lora):
        if is_trained(config, weight) and any(weight.is_in(chunk) for chunk in chunks):
            ranks = _copies(weight, layout) if sharded else 1
            size = math.prod(local_shape(weight, layout.tensor)) / ranks
            sizes[weight.tower == "language_model"] += SINGLE * size
    return max(sizes.values())


def _passes_peak(share: Share, chunks: tuple[Chunk, ...], stage: int) -> float:
    """The highest sum of saved and passing activations while micro-batches go through."""
    config, layout = share.config, share.layout
    stages = layout.pipeline
    virtual = virtual_stages_of(config.parallel, config.model.language.num_layers)
    saved = {i * stages + stage: saved_bytes(share, chunk) for i, chunk in enumerate(chunks)}
    passing = {i * stages + stage: passing_bytes(share, c) for i, c in enumerate(chunks)}
    live = peak = 0.0
    # Some rounds of the schedule are enough: then memory repeats.
    count = min(layout.micro_batches(config.train), 2 * stages)
    for work in order(stage, stages, virtual, count):
        if work.forward:
            live += saved[work.chunk]
            peak = max(peak, live)
        else:
            peak = max(peak, live + passing[work.chunk])
            live -= saved[work.chunk]
    return peak


def saved_bytes(share: Share, chunk: Chunk) -> float:
    """What a chunk keeps of a micro-batch for its backward pass."""
    hidden = share.config.model.language.hidden_size
    stream = HALF * share.tokens * hidden / share.scattered  # [s, H] between layers
    recompute = Recompute.of(share.config, chunk)
    count = len(chunk.layers)
    kept, whole = count, 0.0
    if recompute.granularity == "full":
        each = recompute.num_layers or 1
        kept = max(0, count - each) if recompute.method == "block" else 0
        inputs = count - kept if recompute.method == "block" else math.ceil(count / each)
        whole += inputs * stream
    whole += kept * layer_bytes(share, without_attention=recompute.granularity == "selective")
    whole += _first_bytes(share) if chunk.is_first else stream
    if chunk.is_last:
        whole += 2 * stream if trains_language(share.config) else stream  # final norm and its input
    elif count:
        whole -= stream  # the output is sent away
    return whole


def trains_language(config: Config) -> bool:
    """Whether the language model's own weights are trained; adapters are not among them."""
    return not (config.train.freeze_llm or config.lora.llm_use_lora)


def layer_bytes(share: Share, without_attention: bool = False) -> float:
    """What a decoder layer keeps of a micro-batch, its output included, its input not."""
    language, tp = share.config.model.language, share.layout.tensor
    s, hidden, head = share.tokens, language.hidden_size, _head(share.config)
    heads, groups = language.num_attention_heads, language.num_query_groups
    stream = HALF * s * hidden / share.scattered
    queries, ffn = HALF * s * heads * head / tp, HALF * s * language.ffn_hidden_size / tp
    keys = HALF * s * groups * head / tp
    kept = 2 * stream + 2 * SINGLE * s / share.scattered  # two sums, two norms' statistics
    kept += 4 * HALF * s * head  # cosine and sine for queries and for keys
    if share.layout.context > 1:
        repeated = max(1, share.layout.context * tp / groups)
        kept += queries + 2 * keys * repeated
    else:
        kept += (queries + 2 * keys) + (queries + keys)  # of the product, and turned
    if not without_attention:
        kept += queries + SINGLE * s * heads / tp
    kept += 2 * ffn  # gate and up
    if trains_language(share.config):  # inputs of the four products
        kept += 2 * stream + queries + ffn
    lora = share.config.lora
    inputs = {"qkv": stream, "proj": queries, "fc1": stream, "fc2": ffn}
    for target in lora.targets:  # of A, what dropout made of it with its mask, and of B
        dropped = inputs[target] / HALF if lora.lora_dropout else 0.0
        kept += inputs[target] + dropped + HALF * s * lora.lora_rank
    return kept


def _first_bytes(share: Share) -> float:
    """Merged embeddings and the vision tower's activations."""
    config, layout = share.config, share.layout
    model, train = config.model, config.train
    hidden, patches = model.language.hidden_size, model.vision.tokens_per_image
    images, ranks = share.images, layout.tensor * layout.context
    kept = HALF * share.tokens * hidden
    vision_trains = not (train.freeze_vit and train.freeze_projector)
    if share.load.images == 0 and not vision_trains:
        return kept
    features = HALF * images * patches * hidden
    kept += ranks * features
    if not vision_trains:
        return kept
    if recomputes_vision(train, images):  # only features are kept; one turn is computed again
        frozen = HALF * images * patches * model.vision.hidden_size if train.freeze_vit else 0.0
        return kept + features + frozen
    return kept + vision_bytes(share, images)


def recomputes_vision(train: TrainConfig, images: int) -> bool:
    """Whether the tower runs again in the backward pass."""
    return train.recompute_vit or images > train.vit_micro_batch_size


def vision_bytes(share: Share, images: int) -> float:
    """What tower and projector keep of so many images."""
    config = share.config
    vision, patches = config.model.vision, config.model.vision.tokens_per_image
    projector = HALF * images * patches * 2 * config.model.language.hidden_size
    if config.train.freeze_vit:
        return projector + HALF * images * (patches + 1) * vision.hidden_size
    tokens = images * (patches + 1)
    layer = 16 * vision.hidden_size + 6 * vision.ffn_hidden_size
    layer += 4 * SINGLE + SINGLE * vision.num_attention_heads
    start = HALF * images * 3 * vision.image_size**2 + 2 * HALF * tokens * vision.hidden_size
    return projector + start + vision.layers_used * tokens * layer


def passing_bytes(share: Share, chunk: Chunk) -> float:
    """What comes on top at the highest point of a chunk's backward pass."""
    candidates = [_feed_forward_backward(share, chunk)] if chunk.layers else [0.0]
    if chunk.is_last:
        candidates.append(_loss(share))
    if chunk.is_first:
        candidates.append(_first_backward(share, chunk))
    return max(candidates)


def _feed_forward_backward(share: Share, chunk: Chunk) -> float:
    language, tp = share.config.model.language, share.layout.tensor
    s, hidden = share.tokens, language.hidden_size
    stream, ffn = HALF * s * hidden / share.scattered, HALF * s * language.ffn_hidden_size / tp
    trains = trains_language(share.config)
    # SwiGLU's backward: its output's gradient, two products, the gradients of gate and up. Then
    # the gradient of the first matrix beside these.
    swiglu = stream + 5 * ffn - (ffn if trains else 0)
    matrix = HALF * 2 * language.ffn_hidden_size * hidden / tp if trains else 0.0
    product = stream + 2 * ffn + matrix + HALF * s * hidden - (3 * ffn if trains else 2 * ffn)
    highest = max(swiglu, product)
    recompute = Recompute.of(share.config, chunk)
    if recompute.granularity != "full":
        return highest
    each, count = recompute.num_layers or 1, len(chunk.layers)
    if recompute.method == "uniform":
        return each * layer_bytes(share) + highest
    # The first layers are computed again when what the others kept has gone.
    kept = max(0, count - each) * layer_bytes(share)
    again = layer_bytes(share) - kept + highest
    return max(again, highest) if kept else again


def _loss(share: Share) -> float:
    language, tp = share.config.model.language, share.layout.tensor
    s, hidden = share.tokens, language.hidden_size
    rows = padded_vocab_size(language.vocab_size, tp) / tp
    gathered = HALF * s * hidden if share.scattered > 1 else 0
    logits = HALF * min(s, LOSS_CHUNK) * rows
    gradients: float = SINGLE * s * hidden
    backward: float = gradients + HALF * s * hidden
    if trains_language(share.config):
        gradients += SINGLE * rows * hidden
        backward = gradients + HALF * s * hidden + HALF * rows * hidden
    return gathered + max(gradients + logits, backward)


def _first_backward(share: Share, chunk: Chunk) -> float:
    """The gradient of the embedding, when the layers' activations are gone; the tower's turn."""
    language, tp = share.config.model.language, share.layout.tensor
    hidden = language.hidden_size
    gone = saved_bytes(share, chunk) - _first_bytes(share)
    rows = padded_vocab_size(language.vocab_size, tp) / tp
    embedding = HALF * rows * hidden if trains_language(share.config) else 0.0
    train, tower = share.config.train, 0.0
    if recomputes_vision(train, share.images) and not train.freeze_vit:
        tower = vision_bytes(share, min(share.images, train.vit_micro_batch_size))
    return max(embedding, tower) + 2 * HALF * share.tokens * hidden - gone


def _head(config: Config) -> int:
    return config.model.language.hidden_size // config.model.language.num_attention_heads
