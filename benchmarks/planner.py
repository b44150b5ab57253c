"""The planner against dry runs, dry runs against real tensors, simulated against exact bubbles.

    python benchmarks/planner.py [--layouts 30] [--choices 10]

The random layouts have the widths of gmai-vl-7b and few layers, so that each takes seconds.
Exits with 1 if a bar is missed.
"""

import argparse
import contextlib
import dataclasses
import importlib
import math
import random
import sys
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any
from unittest import mock

from kernel_figures import Figure, at_least, show, write

from megatron_gmai.config import Config, ParallelConfig
from megatron_gmai.layout import Layout
from megatron_gmai.layout_rules import batch_problems, layout_problems
from megatron_gmai.planner.cost import Load, load_of, with_vocabulary
from megatron_gmai.planner.hardware import Gpu, gpu_called
from megatron_gmai.planner.layout import settle_layout
from megatron_gmai.planner.memory import stage_memory
from megatron_gmai.planner.schedule import simulate
from megatron_gmai.planner.search import (
    GIB,
    Plan,
    candidate_of,
    plan,
    recomputations,
    search,
    sizes_of,
)
from megatron_gmai.presets import preset
from megatron_gmai.runtime.quiet import quiet_libraries

WITHIN = 0.05
AHEAD = 3  # every so many layouts are taken with the images on all ranks as well


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


def encoding_ahead(config: Config) -> Config:
    """The same with the images on all ranks."""
    parallel = dataclasses.replace(config.parallel, vision_phase="all-ranks")
    return dataclasses.replace(config, parallel=parallel)


def compare(config: Config, world: int, images: int, stage: int) -> dict[str, Any]:
    """Predicted and counted peak of a rank of a pipeline stage."""
    from megatron_gmai.dry_run.run import dry_run

    layout = Layout.of(config.parallel, world)
    predicted = stage_memory(config, layout, stage, load_of(config, images))
    counted = dry_run(config, stage * (world // layout.pipeline), world, images)
    return {
        "layout": f"TP{layout.tensor} PP{layout.pipeline} CP{layout.context} DP{layout.data} "
        f"VPP{config.parallel.num_virtual_stages_per_pipeline_rank}, stage {stage}, "
        f"micro-batch {config.train.micro_batch_size}, {images} images, "
        f"recompute {config.train.selective_recompute:g}, "
        f"layers {config.parallel.pipeline_layout or 'even'}, "
        f"trained: {'all' if not config.train.freeze_llm else 'vision'}, "
        f"{config.parallel.vision_phase}",
        "predicted_bytes": round(predicted.peak),
        "counted_bytes": counted.peak_bytes,
        "predicted_static_bytes": round(predicted.static),
        "counted_static_bytes": counted.static_bytes,
        "ratio": predicted.peak / counted.peak_bytes,
        "peak": counted.peak_place,
    }


def chosen(draw: random.Random) -> dict[str, Any]:
    """The planner's first layout, and the fastest by the same simulation of those that fit by their
    counted memory."""
    world, gpu = draw.choice((4, 8)), gpu_called(draw.choice(("a100-80gb", "h100-80gb", "b200")))
    phase, images = draw.choice((1, 2, 3)), draw.choice((0, 1, 3))
    base = with_vocabulary(preset("gmai-vl-7b"))
    model = dataclasses.replace(
        base.model,
        language=dataclasses.replace(base.model.language, num_layers=8),
        vision=dataclasses.replace(base.model.vision, num_layers=5),
    )
    train = dataclasses.replace(
        base.train, global_batch_size=64, freeze_llm=phase < 3, freeze_vit=phase < 2
    )
    config = dataclasses.replace(base, model=model, train=train)
    load = load_of(config, images)
    memories = sorted(made.peak_gib for made in every_plan(config, world, load, gpu))
    # So tight that part of the layouts fits.
    limit = memories[round(draw.uniform(0.1, 0.6) * len(memories))] * draw.uniform(1.0, 1.02)
    gpu = dataclasses.replace(gpu, memory_gib=limit)
    first = search(config, world, load, gpu).plans[0]
    for made in sorted(every_plan(config, world, load, gpu), key=lambda made: made.time.seconds):
        # No prediction is that far off: the others need not be counted.
        if made.peak_gib < 1.1 * limit and counted_gib(made, images) <= limit:
            break
    else:
        made = None
    return {
        "gpus": f"{world} x {gpu.name} with {limit:.1f} GiB, phase {phase}, {images} images",
        "planner": first.flags(),
        "dry_runs": None if made is None else made.flags(),
        "same": made is not None and made.config == first.config,
    }


def every_plan(config: Config, world: int, load: Load, gpu: Gpu) -> list[Plan]:
    """All layouts with everything that may be recomputed, whether they fit or not."""
    candidates = (
        candidate_of(config, world, load, sizes, *recomputed)
        for sizes in sizes_of(config, world, load, gpu)
        for recomputed in recomputations(config, load)
    )
    return [plan(made, world, load, gpu) for made in candidates if made is not None]


def counted_gib(made: Plan, images: int) -> float:
    """What a dry run counts for the stage that is predicted to be the tightest."""
    from megatron_gmai.dry_run.run import dry_run

    world, stages = made.layout.world_size, made.layout.pipeline
    return dry_run(made.config, made.tightest * (world // stages), world, images).peak_bytes / GIB


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
            place_of = world_of(made, 0, world, "cpu", counter.note_synchronize)
            with place_of as place, counter, without_values():
                real = count_step(made, place, counter, images)
            dry = dry_run(made, 0, world, images, kind="cpu")
            name = f"TP{tensor} PP{pipeline} CP{context}{' sharded' if sharded else ''}"
            equal[name] = (dry.static, dry.peak) == (real.static, real.peak)
    return equal


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """A dry run has no labels to sort unlabelled tokens out by, and no numbers to skip a step for:
    real tensors are counted alike."""
    linear = importlib.import_module("gmai_kernels.linear_cross_entropy")
    with (
        mock.patch.object(linear, "readable", lambda tensor: False),
        mock.patch.object(math, "isfinite", lambda number: True),
    ):
        yield


def main() -> int:
    """Returns 1 if a bar is missed."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    flags.add_argument("--layouts", type=int, default=30)
    flags.add_argument("--choices", type=int, default=10)
    flags.add_argument("--output", type=Path, default=Path("runs/bench/planner.json"))
    given = flags.parse_args()
    quiet_libraries()
    memory, choices = [], []
    draw = random.Random(0)
    for number in range(given.layouts):
        config, world, images = random_layout(draw)
        stage = draw.randrange(config.parallel.pipeline_model_parallel_size)
        cases = [config, encoding_ahead(config)] if number % AHEAD == 0 else [config]
        for case in cases:
            memory.append(compare(case, world, images, stage))
            print(f"{memory[-1]['ratio']:.4f}  {memory[-1]['layout']}", flush=True)
    draw = random.Random(1)
    for _ in range(given.choices):
        choices.append(chosen(draw))
        row = choices[-1]
        print(f"{row['gpus']}: {row['planner']}", flush=True)
        if not row["same"]:
            print(f"  by dry runs: {row['dry_runs']}", flush=True)
    waiting, equal = bubbles(), reality()
    near = sum(abs(row["ratio"] - 1) <= WITHIN for row in memory)
    same = sum(row["same"] for row in choices)
    exact = sum(math.isclose(row["simulated"], row["exact"]) for row in waiting)
    figures = [
        share(f"memory within {WITHIN:.0%} of the dry run", near, memory),
        share("the best layout is also the dry runs' best", same, choices, 0.9),
        share("bubble of uniform stages is the closed form", exact, waiting),
        share("dry run counts the bytes of real tensors", sum(equal.values()), equal),
    ]
    show(figures)
    rows = {"memory": memory, "choices": choices, "bubbles": waiting, "real_tensors": equal}
    write(given.output, figures, [], **rows)
    return int(any(figure.holds is False for figure in figures))


def share(name: str, count: int, cases: Sized, needed: float = 1.0) -> Figure:
    """So many of the cases, of which a share is needed."""
    return at_least(name, count, f"of {len(cases)}", needed * len(cases))


if __name__ == "__main__":
    sys.exit(main())
