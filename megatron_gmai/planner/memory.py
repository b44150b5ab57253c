"""Memory of a rank, from the shapes that the code saves: bf16 weights, fp32 gradients and masters.

Legend of one micro-batch on one rank: s tokens (of this context-parallel rank), H hidden, D head
size, A heads, G key-value groups, F feed-forward, V vocabulary rows, n images of p tokens.
A dry run (megatron_gmai/dry_run) counts the same from the code itself; the two are compared in
tests/planner.
"""

import functools
import math
from dataclasses import dataclass

from megatron_gmai.config import Config, LoraConfig, ModelConfig
from megatron_gmai.layout import Chunk, Layout, Recompute, chunks_of_rank, encodes_ahead
from megatron_gmai.layout import virtual_stages as virtual_stages_of
from megatron_gmai.planner.cost import Load
from megatron_gmai.planner.schedule import order
from megatron_gmai.planner.share import HALF, SINGLE, Share
from megatron_gmai.planner.vision import (
    Ahead,
    backward_bytes,
    feature_bytes,
    kept_bytes,
    vision_trains,
)
from megatron_gmai.weights import Weight, local_shape, padded_vocab_size, weights

LOSS_CHUNK = 2048  # tokens whose logits exist at once (gmai_kernels.linear_cross_entropy)


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


def stage_memory(config: Config, layout: Layout, stage: int, load: Load) -> Memory:
    """The memory of the ranks of a pipeline stage."""
    chunks = chunks_of_rank(config.parallel, config.model.language.num_layers, stage)
    share = Share(config, load, layout)
    held, gradients, optimizer = static_bytes(config, layout, chunks)
    ahead = Ahead.of(share, stage)
    passes = max(ahead.before, _passes_peak(share, chunks, stage, ahead), ahead.after)
    constant: float = (SINGLE * config.model.language.max_position_embeddings) * _head(config)
    stream = HALF * share.tokens * config.model.language.hidden_size
    if share.scattered > 1 and trains_language(config):
        constant += stream  # Megatron's buffer, for inputs of trained linears
    if layout.pipeline > 1:
        # The gradient that was sent last; with overlapped transfers the one before it as well, and
        # an input and a gradient that have come early.
        constant += (4 if interleaves(config) else 1) * stream / share.scattered
    return Memory(held, gradients, optimizer, ahead.kept + passes + constant)


def static_bytes(
    config: Config, layout: Layout, chunks: tuple[Chunk, ...]
) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer state."""
    held = gradients = optimizer = 0.0
    sharded, ahead = config.parallel.use_distributed_optimizer, encodes_ahead(config.parallel)
    for weight in weight_table(config.model, config.lora):
        copies = sum(weight.is_in(chunk) for chunk in chunks)
        size = copies * math.prod(local_shape(weight, layout.tensor))
        held += HALF * size
        if is_trained(config, weight):
            gradients += SINGLE * size
            ranks = _copies(weight, layout, ahead) if sharded else 1
            optimizer += 3 * SINGLE * size / ranks  # master, two moments
    return held, gradients, optimizer


@functools.lru_cache(maxsize=8)
def weight_table(model: ModelConfig, lora: LoraConfig) -> tuple[Weight, ...]:
    """The weights, kept because a search asks for them thousands of times."""
    return tuple(weights(model, lora).values())


def is_trained(config: Config, weight: Weight) -> bool:
    train = config.train
    if weight.tower in config.lora.towers:
        return weight.is_adapter
    return not {
        "vision_model": train.freeze_vit,
        "projector": train.freeze_projector,
        "language_model": train.freeze_llm,
    }[weight.tower]


def _copies(weight: Weight, layout: Layout, ahead: bool) -> int:
    """Ranks over which its optimizer state is sharded."""
    copies = layout.data * layout.context
    if weight.tower == "language_model":
        return copies
    return layout.world_size if ahead else copies * layout.tensor


def _passes_peak(share: Share, chunks: tuple[Chunk, ...], stage: int, ahead: Ahead) -> float:
    """The highest sum of saved and passing activations while micro-batches go through."""
    config, layout = share.config, share.layout
    stages = layout.pipeline
    virtual = virtual_stages_of(config.parallel, config.model.language.num_layers)
    saved = {i * stages + stage: saved_bytes(share, chunk) for i, chunk in enumerate(chunks)}
    passing = {i * stages + stage: passing_bytes(share, c) for i, c in enumerate(chunks)}
    # Some rounds of the schedule are enough: then memory repeats, but for the features' gradients.
    whole = layout.micro_batches(config.train)
    count = min(whole, 2 * stages)
    gradient = ahead.leaf if vision_trains(config.train) else 0.0
    live = peak = whole * ahead.leaf + (whole - count) * gradient
    for work in order(stage, stages, virtual, count):
        if work.forward:
            live += saved[work.chunk]
            peak = max(peak, live)
        else:
            peak = max(peak, live + passing[work.chunk])
            live -= saved[work.chunk]
            if work.chunk == 0:
                live += gradient
    return max(peak, live + (ahead.gathered if gradient else 0.0))


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
        whole += _final_norm_bytes(share)
    elif count and not interleaves(share.config):
        whole -= stream  # the output is sent away; Megatron's interleaved schedule keeps it
    return whole


def interleaves(config: Config) -> bool:
    """Whether a stage has several chunks."""
    return virtual_stages_of(config.parallel, config.model.language.num_layers) > 1


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
        kept += 2 * stream + ffn
        # The third one's is what attention keeps itself, but for an exchange between them.
        kept += queries if without_attention or share.layout.context > 1 else 0.0
    lora = share.config.lora
    inputs = {"qkv": stream, "proj": queries, "fc1": stream, "fc2": ffn}
    # Of A, what dropout made of it with its mask, and of B.
    for target in lora.targets_in("language_model"):
        dropped = inputs[target] / HALF if lora.lora_dropout else 0.0
        kept += inputs[target] + dropped + HALF * s * lora.lora_rank
    return kept


def _first_bytes(share: Share) -> float:
    """Merged embeddings, with the features that were merged, and the tower's activations."""
    config, layout, images = share.config, share.layout, share.images
    kept: float = HALF * share.tokens * config.model.language.hidden_size
    if not vision_trains(config.train):
        return kept
    ahead = encodes_ahead(config.parallel)
    if layout.tensor * layout.context > 1:  # gathered
        kept += feature_bytes(share, share.all_images)
    elif not ahead:
        kept += feature_bytes(share, images)
    return kept if ahead else kept + kept_bytes(share, images)


def passing_bytes(share: Share, chunk: Chunk) -> float:
    """What comes on top at the highest point of a chunk's backward pass."""
    candidates = [_feed_forward_backward(share, chunk)] if chunk.layers else [0.0]
    if chunk.is_last:
        candidates.append(_loss(share))
    if chunk.is_first:
        candidates.append(_first_backward(share, chunk))
    return max(candidates)


def _final_norm_bytes(share: Share) -> float:
    """What the final norm hands to the loss; with sequence parallelism the loss gathers its own."""
    stream: float = HALF * share.tokens * share.config.model.language.hidden_size
    return stream if share.scattered == 1 else 0.0


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
    if chunk.is_last:  # final norm and loss are behind it, and with them the last layer's output
        highest -= _final_norm_bytes(share) + stream
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
    ahead = encodes_ahead(share.config.parallel)
    tower = 0.0 if ahead else backward_bytes(share, share.images)
    return max(embedding, tower) + 2 * HALF * share.tokens * hidden - gone


def _head(config: Config) -> int:
    return config.model.language.hidden_size // config.model.language.num_attention_heads
