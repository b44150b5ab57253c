"""`--pipeline-layout auto`: decoder layers per chunk, so that all chunks take equally long."""

import dataclasses

from megatron_gmai.config import Config
from megatron_gmai.layout import encodes_ahead, virtual_stages
from megatron_gmai.planner.cost import (
    Load,
    Passes,
    image_flops,
    layer_flops,
    load_of,
    output_flops,
    with_vocabulary,
)

AUTO = "auto"


def settle_layout(config: Config, images_per_pack: float) -> tuple[Config, str | None]:
    """The configuration with a list in the place of `--pipeline-layout auto`, and a line about it.

    Raises ValueError where there are fewer layers than chunks.
    """
    if config.parallel.pipeline_layout != AUTO:
        return config, None
    load = load_of(config, images_per_pack)
    layers = balanced_layers(config, load)
    listed = None if len(layers) == 1 else ",".join(map(str, layers))
    parallel = dataclasses.replace(config.parallel, pipeline_layout=listed)
    note = (
        f"--pipeline-layout auto -> {','.join(map(str, layers))}: at {images_per_pack:.2f} images "
        f"per pack the slowest stage takes {imbalance(config, layers, load):.3f} x the mean"
    )
    return dataclasses.replace(config, parallel=parallel), note


def balanced_layers(config: Config, load: Load) -> tuple[int, ...]:
    """Decoder layers of each chunk, in the order of the model: the slowest is as fast as can be.

    The first chunk also encodes the images, the last one has output layer and loss. Layers are
    alike, so giving each to the chunk that is least loaded with it is optimal. All chunks but the
    first have a layer at least.
    """
    total = config.model.language.num_layers
    try:
        virtual = virtual_stages(config.parallel, total)
    except ValueError as error:
        raise ValueError(f"--pipeline-layout auto: {error}") from error
    chunks = config.parallel.pipeline_model_parallel_size * virtual
    if total < max(1, chunks - 1):
        raise ValueError(
            f"--pipeline-layout auto: {chunks} chunks (PP x virtual stages) for {total} layers; "
            "give fewer stages"
        )
    extra, layer = _extra(config, load, chunks), _layer(config, load)
    layers = [0] + [1] * (chunks - 1)
    for _ in range(total - sum(layers)):
        # Of equals the later one: it has fewer micro-batches in flight, so less memory.
        best = min(range(chunks), key=lambda c: (extra[c] + layer * (layers[c] + 1), -c))
        layers[best] += 1
    return tuple(layers)


def imbalance(config: Config, layers: tuple[int, ...], load: Load) -> float:
    """The slowest chunk's operations over the mean of all."""
    extra, layer = _extra(config, load, len(layers)), _layer(config, load)
    costs = [more + layer * count for more, count in zip(extra, layers, strict=True)]
    return max(costs) / (sum(costs) / len(costs))


def _layer(config: Config, load: Load) -> float:
    recomputed = config.train.selective_recompute
    if config.train.recompute_granularity == "full":
        recomputed = 1.0  # counted as if all were: the share differs by chunk
    settled = with_vocabulary(config)
    forward_share = 1 / (1 + Passes.of(config).language)
    return layer_flops(settled, load) * (1 + recomputed * forward_share)


def _extra(config: Config, load: Load, chunks: int) -> list[float]:
    """Operations of each chunk beside its decoder layers, per pack. Images and tokens are both
    shared by the TP x CP ranks, so their ratio is that of one rank."""
    settled = with_vocabulary(config)
    extra = [0.0] * chunks
    if not encodes_ahead(config.parallel):  # else all stages share them, outside the pipeline
        extra[0] += load.images * image_flops(settled)
    extra[-1] += output_flops(settled, load)
    return extra
