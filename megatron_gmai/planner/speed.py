"""Seconds of a training step, from operations, bytes and messages.

A pass takes the longer of what the device computes and what the host needs to launch it; messages
between tensor- and context-parallel ranks are not hidden behind products, as in Megatron's plain
linears. Gradients are reduced behind the backward pass of the last micro-batch with
`--overlap-grad-reduce`, weights gathered behind the first forward pass with
`--overlap-param-gather`; what does not fit behind them is added. With `--vision-phase all-ranks`
the images of a step are encoded before the pipeline's time, and their gradients taken after it.
"""

import math
from dataclasses import dataclass, field

from megatron_gmai.config import Config
from megatron_gmai.layout import (
    Chunk,
    Layout,
    Recompute,
    chunks_of_rank,
    encodes_ahead,
    virtual_stages,
)
from megatron_gmai.planner.cost import (
    Load,
    Passes,
    layer_attention,
    layer_products,
    output_products,
    projector_flops,
    step_flops,
    tower_flops,
)
from megatron_gmai.planner.hardware import Gpu
from megatron_gmai.planner.memory import static_bytes, weight_table
from megatron_gmai.planner.schedule import Timeline, simulate
from megatron_gmai.planner.share import HALF, SINGLE, Share
from megatron_gmai.planner.vision import feature_bytes, recomputes_vision
from megatron_gmai.weights import Tower, local_shape

SIMULATED, SPAN = 8, 4  # rounds of PP micro-batches; and of which the pace is taken
LAUNCH = 5e-6  # seconds of the host for an operator in eager PyTorch
LATENCY = 15e-6  # seconds of a collective or a message
SENT = 0.8  # share of a link's bandwidth that large messages get
MOVED = 0.8  # of the memory's
ATTENTION = 0.6  # of the products' speed, in fused attention
TOWER = 0.8  # of the products' speed in the vision tower, whose matrices are smaller
# Operators of a decoder layer, of a tower layer and of an adapter, counted by dry runs.
LAYER_LAUNCHES = {"forward": 45, "backward": 65}
TOWER_LAUNCHES = {"forward": 22, "backward": 42}
ADAPTER_LAUNCHES = {"forward": 4, "backward": 14}


@dataclass(frozen=True)
class StepTime:
    """A predicted step."""

    seconds: float
    timeline: Timeline  # of the step, or of its first micro-batches
    bubble: float  # share of the pipeline's time in which stages wait
    parts: dict[str, float] = field(default_factory=dict)  # seconds beside the pipeline's
    model_flops: float = 0.0  # of the global batch
    world_size: int = 1

    def mfu(self, gpu: Gpu) -> float:
        return self.model_flops / (self.seconds * self.world_size * gpu.peak_flops)


def step_time(config: Config, layout: Layout, load: Load, gpu: Gpu) -> StepTime:
    """Simulate the pipeline and add what is not hidden behind it."""
    share, parallel = Share(config, load, layout), config.parallel
    stages = layout.pipeline
    virtual = virtual_stages(parallel, config.model.language.num_layers)
    count = layout.micro_batches(config.train)
    chunks: list[Chunk] = []
    by_stage = [
        chunks_of_rank(parallel, config.model.language.num_layers, p) for p in range(stages)
    ]
    for index in range(stages * virtual):
        chunks.append(by_stage[index % stages][index // stages])
    forward = [pass_seconds(share, chunk, gpu, "forward") for chunk in chunks]
    backward = [pass_seconds(share, chunk, gpu, "backward") for chunk in chunks]
    shown = min(count, SIMULATED * stages)
    timeline, shorter = (
        simulate(stages, virtual, n, forward, backward, transfer(share, gpu))
        for n in (shown, max(stages, shown - SPAN * stages))
    )
    # More micro-batches repeat what those in the middle do, at the pace of the slowest stage.
    slowest = max(sum(forward[p::stages]) + sum(backward[p::stages]) for p in range(stages))
    pace = max(slowest, (timeline.seconds - shorter.seconds) / (SPAN * stages))
    pipeline = timeline.seconds + (count - shown) * pace
    bubble = 1 - count * (sum(forward) + sum(backward)) / (stages * pipeline)
    vision = [ahead_seconds(share, gpu, way) for way in ("forward", "backward")]
    exposed, update = [], []
    for stage, held in enumerate(by_stage):
        own = range(stage, len(chunks), stages)
        hidden = (
            vision[1] + sum(backward[c] for c in own) if parallel.overlap_grad_reduce else 0.0,
            vision[0] + sum(forward[c] for c in own) if parallel.overlap_param_gather else 0.0,
        )
        reduce, gather = state_messages(config, layout, held, gpu)
        end = timeline.last_end(stage) + max(0.0, reduce - hidden[0])
        exposed.append(end - timeline.seconds + max(0.0, gather - hidden[1]))
        update.append(update_seconds(config, layout, held, gpu))
    parts = {
        "pipeline": pipeline,
        "vision": sum(vision),
        "exposed": max(0.0, *exposed),
        "optimizer": max(update),
    }
    return StepTime(
        sum(parts.values()), timeline, bubble, parts, useful_flops(config, load), layout.world_size
    )


def useful_flops(config: Config, load: Load) -> float:
    """Model FLOPs of a global batch."""
    packs = config.train.global_batch_size
    length = round(packs * load.length)
    images, samples = round(packs * load.images), round(packs * load.segments)
    return step_flops(config, length, images, samples)


def pass_seconds(share: Share, chunk: Chunk, gpu: Gpu, direction: str) -> float:
    """One chunk's forward or backward pass of a micro-batch."""
    layers = len(chunk.layers)
    one = layer_seconds(share, gpu, direction)
    seconds = layers * one
    if direction == "backward":
        again = Recompute.of(share.config, chunk)
        if again.granularity == "full":
            count = layers if again.method == "uniform" else min(layers, again.num_layers or 0)
            seconds += count * layer_seconds(share, gpu, "forward")
    if chunk.is_first and share.load.images > 0:
        if not encodes_ahead(share.config.parallel):
            seconds += vision_seconds(share, gpu, direction, share.images)
        if direction == "forward":
            seconds += gather_seconds(share, gpu)
    if chunk.is_last:
        seconds += loss_seconds(share, gpu, direction)
    return seconds


def layer_seconds(share: Share, gpu: Gpu, direction: str) -> float:
    """A decoder layer's pass."""
    config, language, layout = share.config, share.config.model.language, share.layout
    times = 1 if direction == "forward" else Passes.of(config).language
    packs, ranks = config.train.micro_batch_size, layout.tensor * layout.context
    products = times * packs * share.load.length * layer_products(language) / ranks
    attention = layer_attention(language, share.load.squares) * packs / ranks
    attention *= 1 if direction == "forward" else 2.5  # scores are computed again
    device = products / gpu.product_flops + attention / (gpu.product_flops * ATTENTION)
    device += layer_traffic(share) * max(1, times) / (gpu.memory_gb_s * 1e9 * MOVED)
    adapted = adapter_seconds(share, gpu, "language_model", share.tokens) / language.num_layers
    device += adapted * (1 if direction == "forward" else 2)
    adapters = len(config.lora.targets_in("language_model"))
    launches = LAYER_LAUNCHES[direction] + adapters * ADAPTER_LAUNCHES[direction]
    seconds = max(device, launches * LAUNCH) + layer_messages(share, gpu, times)
    # An adapter exchanges r numbers a token: a message's latency is all that it takes.
    return seconds + (adapters * LATENCY if layout.tensor > 1 else 0.0)


def adapter_seconds(share: Share, gpu: Gpu, tower: Tower, tokens: int) -> float:
    """All adapters of a tower in a forward pass of so many tokens: products of rank r, which read
    and write more than they compute."""
    config, products, traffic = share.config, 0.0, 0.0
    scattered = share.scattered if tower == "language_model" else 1
    for weight in weight_table(config.model, config.lora):
        if not (weight.is_adapter and weight.tower == tower):
            continue
        rows, columns = local_shape(weight, share.layout.tensor)
        seen = tokens / (scattered if weight.cut == "none" else 1)
        products += 2 * seen * rows * columns
        # A reads the linear's input. B's output is written, scaled, and added to the linear's.
        traffic += HALF * seen * (6 * rows if weight.name.endswith(".b") else columns)
    return products / gpu.product_flops + traffic / (gpu.memory_gb_s * 1e9 * MOVED)


def layer_traffic(share: Share) -> float:
    """Bytes that a layer's element-wise work reads and writes in a forward pass."""
    language, tp = share.config.model.language, share.layout.tensor
    s = share.tokens
    stream = HALF * s * language.hidden_size
    # Two norms read and write; two sums read two and write one; turning queries and keys takes
    # about eight passes unfused; SwiGLU reads two and writes one; attention is copied once.
    return (
        10 * stream / share.scattered
        + 12 * stream / tp
        + 3 * (HALF * s * language.ffn_hidden_size / tp)
    )


def layer_messages(share: Share, gpu: Gpu, times: int) -> float:
    """Seconds of a layer's messages between TP and CP ranks in one direction."""
    layout, language = share.layout, share.config.model.language
    stream = HALF * share.tokens * language.hidden_size
    seconds = 0.0
    if layout.tensor > 1:
        # Two all-reduces, or as many bytes as gathers and scatters; backward passes gather the
        # inputs of two products again for the gradients of their weights.
        one = stream * (layout.tensor - 1) / layout.tensor / (gpu.nvlink_gb_s * 1e9 * SENT)
        gathers = 4 + (2 if times > 1 and share.scattered > 1 else 0)
        seconds += gathers * (one + LATENCY)
    if layout.context > 1:
        wide = (language.num_attention_heads + 2 * language.num_query_groups) / (
            language.num_attention_heads
        )
        parts = (1 + wide) * stream / layout.tensor * (layout.context - 1) / layout.context
        rate = bandwidth(gpu, layout.tensor * layout.context, layout.tensor)
        seconds += parts / rate + 2 * LATENCY
    return seconds


def bandwidth(gpu: Gpu, reach: int, stride: int = 1) -> float:
    """Bytes a second of a collective between ranks `stride` apart, the farthest two `reach`.

    Between nodes a ring may leave through the network card of each of its ranks in a node.
    """
    if reach <= gpu.per_node:
        return gpu.nvlink_gb_s * 1e9 * SENT
    inside = max(1, gpu.per_node // stride)
    return min(gpu.nvlink_gb_s, gpu.network_gb_s * inside) * 1e9 * SENT


def vision_seconds(share: Share, gpu: Gpu, direction: str, images: int) -> float:
    """Tower and projector on so many images of this rank."""
    config, passes, model = share.config, Passes.of(share.config), share.config.model
    forward = direction == "forward"
    tower = (1 if forward else passes.tower) * tower_flops(model)
    projector = (1 if forward else passes.projector) * projector_flops(model)
    device = images * (tower + projector) / (gpu.product_flops * TOWER)
    tokens = images * (model.vision.tokens_per_image + 1)
    adapted = adapter_seconds(share, gpu, "vision_model", tokens)
    device += adapted * (1 if forward else 2)
    turns = math.ceil(images / config.train.vit_micro_batch_size)
    busy = turns if forward or passes.tower else 0
    adapters = len(config.lora.targets_in("vision_model"))
    operators = TOWER_LAUNCHES[direction] + adapters * ADAPTER_LAUNCHES[direction]
    seconds = max(device, busy * operators * model.vision.layers_used * LAUNCH)
    if not forward and passes.tower and recomputes_vision(config.train, images):
        seconds += vision_seconds(share, gpu, "forward", images)
    return seconds


def gather_seconds(share: Share, gpu: Gpu) -> float:
    """Features of a micro-batch, gathered over TP x CP."""
    ranks = share.layout.tensor * share.layout.context
    if ranks == 1:
        return 0.0
    return feature_bytes(share, share.images * ranks) / bandwidth(gpu, ranks) + LATENCY


def ahead_seconds(share: Share, gpu: Gpu, direction: str) -> float:
    """A step's images where all pipeline ranks encode them, and their way to the first stage."""
    if not encodes_ahead(share.config.parallel) or share.load.images == 0:
        return 0.0
    passes, images = Passes.of(share.config), share.step_images
    if direction == "backward" and not passes.projector:
        return 0.0
    seconds = vision_seconds(share, gpu, direction, images)
    others = share.layout.pipeline - 1
    if others:  # the first stage receives, or sends, what is all others'
        features = others * feature_bytes(share, images)
        seconds += features / stage_bandwidth(share.layout, gpu) + LATENCY
    return seconds


def loss_seconds(share: Share, gpu: Gpu, direction: str) -> float:
    """Output layer and loss: its three products are all made in the forward pass."""
    if direction == "backward":
        return 20 * LAUNCH
    config, layout = share.config, share.layout
    tokens = config.train.micro_batch_size * share.load.length
    times = 1 + Passes.of(config).language
    ranks = layout.tensor * layout.context
    flops = times * tokens * output_products(config.model.language) / ranks
    rows = config.model.language.vocab_size / layout.tensor
    traffic = 4 * HALF * share.tokens * rows  # logits, written and read by the kernels
    return flops / gpu.product_flops + traffic / (gpu.memory_gb_s * 1e9 * MOVED)


def transfer(share: Share, gpu: Gpu) -> float:
    """Seconds until the next stage has a micro-batch's hidden states."""
    layout = share.layout
    if layout.pipeline == 1:
        return 0.0
    size = HALF * share.tokens * share.config.model.language.hidden_size / share.scattered
    return size / stage_bandwidth(layout, gpu) + LATENCY


def stage_bandwidth(layout: Layout, gpu: Gpu) -> float:
    """Bytes a second between ranks of neighbouring stages: one sender has one network card."""
    return bandwidth(gpu, 2 * layout.world_size // layout.pipeline, gpu.per_node)


def state_messages(
    config: Config, layout: Layout, chunks: tuple[Chunk, ...], gpu: Gpu
) -> tuple[float, float]:
    """Seconds to reduce a stage's gradients over its copies, and to gather its updated weights."""
    ranks = layout.data * layout.context
    if ranks == 1:
        return 0.0, 0.0
    held, gradients, _ = static_bytes(config, layout, chunks)
    share = (ranks - 1) / ranks
    reach = layout.tensor * ranks
    sharded = config.parallel.use_distributed_optimizer
    rate = bandwidth(gpu, reach, layout.tensor)
    rounds = math.ceil(math.log2(ranks)) * LATENCY
    reduce = gradients * share * (1 if sharded else 2) / rate + rounds
    trained_weights = gradients * HALF / SINGLE
    gather = min(held, trained_weights) * share / rate + rounds if sharded else 0.0
    return reduce, gather


def update_seconds(config: Config, layout: Layout, chunks: tuple[Chunk, ...], gpu: Gpu) -> float:
    """AdamW reads and writes its state about twice over, by lists of tensors."""
    _, gradients, state = static_bytes(config, layout, chunks)
    return (3 * state + gradients) / (gpu.memory_gb_s * 1e9 * MOVED) + 200 * LAUNCH
