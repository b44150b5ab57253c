"""The planner against dry runs, dry runs against real tensors, simulated against exact bubbles.

    python benchmarks/planner.py [--layouts 30] [--output runs/bench/planner.json]

The random layouts have the widths of gmai-vl-7b and few layers, so that each takes seconds.
"""

import argparse
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from megatron_gmai.config import Config, ParallelConfig
from megatron_gmai.layout import Layout
from megatron_gmai.layout_rules import batch_problems, layout_problems
from megatron_gmai.planner.cost import load_of, with_vocabulary
from megatron_gmai.planner.layout import settle_layout
from megatron_gmai.planner.memory import stage_memory
from megatron_gmai.planner.schedule import simulate
from megatron_gmai.presets import preset
from megatron_gmai.runtime.quiet import quiet_libraries

WITHIN = 0.05


def random_layout(draw: random.Random) -> tuple[Config, int, int]:
    """A configuration that works, its world size and its images per pack."""
    while True:
        config, world, images = _draw(draw)
        rules = (layout_problems, batch_problems)
        if not any(True for rule in rules for _ in rule(config, world)):
            return config, world, images


def _draw(draw: random.Random) -> tuple[Config, int, int]:
    tensor, pipeline = draw.choice((1, 2, 4, 8)), draw.choice((1, 2, 4))
    virtual = draw.choice((1, 2)) if pipeline > 1 else 1
    context, data = draw.choice((1, 1, 2)), draw.choice((1, 2, 8))
    phase, images = draw.choice((1, 2, 3, 3)), draw.choice((0, 1, 3))
    base = with_vocabulary(preset("gmai-vl-7b"))
    language = dataclasses.replace(base.model.language, num_layers=pipeline * virtual * 2)
    vision = dataclasses.replace(base.model.vision, num_layers=5)
    sharded = draw.random() < 0.8
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, language=language, vision=vision),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            num_virtual_stages_per_pipeline_rank=virtual,
            context_parallel_size=context,
            pipeline_layout=draw.choice((None, "auto")) if pipeline > 1 else None,
            sequence_parallel=tensor > 1 and draw.random() < 0.8,
            use_distributed_optimizer=sharded,
            overlap_grad_reduce=sharded,
            overlap_param_gather=sharded,
        ),
        train=dataclasses.replace(
            base.train,
            micro_batch_size=draw.choice((1, 1, 2)),
            freeze_llm=phase < 3,
            freeze_vit=phase < 2,
            selective_recompute=draw.choice((0.0, 0.0, 0.5, 1.0)),
        ),
    )
    return settle_layout(config, images)[0], tensor * pipeline * context * data, images


def compare(config: Config, world: int, images: int, draw: random.Random) -> dict[str, Any]:
    """Predicted and counted peak of one rank."""
    from megatron_gmai.dry_run.run import dry_run

    layout = Layout.of(config.parallel, world)
    stage = draw.randrange(layout.pipeline)
    predicted = stage_memory(config, layout, stage, load_of(config, images))
    counted = dry_run(config, stage * (world // layout.pipeline), world, images)
    return {
        "layout": f"TP{layout.tensor} PP{layout.pipeline} CP{layout.context} DP{layout.data} "
        f"VPP{config.parallel.num_virtual_stages_per_pipeline_rank}, stage {stage}, "
        f"micro-batch {config.train.micro_batch_size}, {images} images, "
        f"recompute {config.train.selective_recompute:g}, "
        f"layers {config.parallel.pipeline_layout or 'even'}, "
        f"trained: {'all' if not config.train.freeze_llm else 'vision'}",
        "predicted_bytes": round(predicted.peak),
        "counted_bytes": counted.peak_bytes,
        "predicted_static_bytes": round(predicted.static),
        "counted_static_bytes": counted.static_bytes,
        "ratio": predicted.peak / counted.peak_bytes,
        "peak": counted.peak_place,
    }


def bubbles() -> list[dict[str, float]]:
    """Simulated and exact waiting of uniform stages."""
    rows = []
    for stages, virtual, count in ((2, 1, 8), (4, 1, 16), (8, 1, 64), (4, 2, 16), (8, 4, 64)):
        chunks = stages * virtual
        timeline = simulate(stages, virtual, count, [1 / virtual] * chunks, [2 / virtual] * chunks)
        exact = (stages - 1) / (virtual * count + stages - 1)
        rows.append({"simulated": timeline.bubble, "exact": exact})
    return rows


def reality() -> dict[str, bool]:
    """Whether a dry run counts the bytes of real CPU tensors, for layouts of a small model."""
    from megatron_gmai.dry_run.absent import world_of
    from megatron_gmai.dry_run.counter import DeviceCounter
    from megatron_gmai.dry_run.run import count_step, dry_run
    from megatron_gmai.runtime import cpu

    config, images = with_vocabulary(preset("gmai-vl-tiny")), 2
    equal = {}
    for tensor, pipeline, context in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1)):
        for sharded in (False, True):
            parallel = ParallelConfig(
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                context_parallel_size=context,
                sequence_parallel=tensor > 1,
                use_distributed_optimizer=sharded,
            )
            made, world = dataclasses.replace(config, parallel=parallel), 8
            counter = DeviceCounter(cpu.CPU, fake=None)
            with world_of(made, 0, world, "cpu", counter.note_synchronize) as place, counter:
                real = count_step(made, place, counter, images)
            dry = dry_run(made, 0, world, images, kind="cpu")
            name = f"TP{tensor} PP{pipeline} CP{context}{' sharded' if sharded else ''}"
            equal[name] = (dry.static, dry.peak) == (real.static, real.peak)
    return equal


def main() -> None:
    flags = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    flags.add_argument("--layouts", type=int, default=30)
    flags.add_argument("--output", type=Path, default=Path("runs/bench/planner.json"))
    given = flags.parse_args()
    quiet_libraries()
    draw = random.Random(0)
    rows = []
    for _ in range(given.layouts):
        config, world, images = random_layout(draw)
        rows.append(compare(config, world, images, draw))
        print(f"{rows[-1]['ratio']:.4f}  {rows[-1]['layout']}", flush=True)
    off = [abs(row["ratio"] - 1) for row in rows]
    result = {
        "memory": rows,
        "memory_worst": max(off),
        "memory_within_5_percent": sum(x <= WITHIN for x in off),
        "bubbles": bubbles(),
        "real_tensors": reality(),
    }
    print(
        f"memory, planner against dry run: {result['memory_within_5_percent']} of {len(rows)} "
        f"within {WITHIN:.0%}, worst {max(off):.2%}"
    )
    print(f"bubbles: {result['bubbles']}")
    print(f"dry run against real tensors, equal bytes: {result['real_tensors']}")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
