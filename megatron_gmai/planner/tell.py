"""What the planner says: the table, why the first is first, one plan in detail."""

from collections.abc import Iterator
from typing import Any

from megatron_gmai.config import TrainConfig
from megatron_gmai.planner.cost import Load
from megatron_gmai.planner.hardware import Gpu
from megatron_gmai.planner.search import GIB, Plan, Search

# Samples of each training phase (GMAI-VL, arXiv 2411.14522).
PHASE_SAMPLES = {1: 11.7e6, 2: 11.7e6, 3: 10.0e6}
COLUMNS = (
    "  #  TP  PP VPP  CP   DP  mb  recompute  vision phase  GiB/rank  step s  bubble    MFU    "
    "tokens/s  tokens/s/GPU   days"
)


def useful_tokens(made: Plan, load: Load, fill: float) -> float:
    """Tokens a second without padding, over all GPUs."""
    return made.config.train.global_batch_size * load.length * fill / made.time.seconds


def days(made: Plan, load: Load, samples: float) -> float:
    """Days for one pass over so many samples; packs hold `load.segments` of them."""
    steps = samples / load.segments / made.config.train.global_batch_size
    return steps * made.time.seconds / 86_400


def table(plans: list[Plan], load: Load, gpu: Gpu, samples: float, fill: float) -> str:
    rows = [COLUMNS]
    for number, made in enumerate(plans, 1):
        layout, parallel, train = made.layout, made.config.parallel, made.config.train
        tokens = useful_tokens(made, load, fill)
        rows.append(
            f"{number:3}{layout.tensor:4}{layout.pipeline:4}"
            f"{parallel.num_virtual_stages_per_pipeline_rank:4}{layout.context:4}{layout.data:5}"
            f"{train.micro_batch_size:4}{_recomputed(train):>11}"
            f"{parallel.vision_phase:>14}{made.peak_gib:10.1f}"
            f"{made.time.seconds:8.2f}{made.time.bubble:8.1%}{made.time.mfu(gpu):7.1%}"
            f"{tokens:12,.0f}{tokens / layout.world_size:14,.0f}{days(made, load, samples):7.2f}"
        )
    return "\n".join(rows)


def _recomputed(train: TrainConfig) -> str:
    return f"{train.selective_recompute:.0%}" + (" + ViT" if train.recompute_vit else "")


def why(found: Search, gpu: Gpu) -> str:
    """Why the first is first."""
    first, *others = found.plans
    lines = [f"First: {first.flags()}"]
    room = gpu.memory_gib - first.peak_gib
    lines.append(
        f"  its tightest rank, in stage {first.tightest}, takes {first.peak_gib:.1f} of "
        f"{gpu.memory_gib:g} GiB and leaves {room:.1f}; {_shares(first)}"
    )
    if others:
        second = others[0]
        lines.append(
            f"  the second takes {second.time.seconds / first.time.seconds - 1:.1%} longer: "
            f"{_shares(second)} ({second.flags()})"
        )
    lines.append(
        f"  {len(found.plans)} layouts fit, {len(found.too_large)} need more memory, "
        f"{found.refused} cannot work"
    )
    return "\n".join(lines)


def _shares(made: Plan) -> str:
    parts = made.time.parts
    vision = f"the images take {parts['vision']:.2f} s beside it; " if parts["vision"] else ""
    return (
        f"the pipeline runs {parts['pipeline']:.2f} s, {made.time.bubble:.1%} of it waiting; "
        f"{vision}"
        f"{parts['exposed']:.2f} s of messages between data-parallel ranks are not hidden; "
        f"the update takes {parts['optimizer']:.2f} s"
    )


def explain(made: Plan, gpu: Gpu) -> Iterator[str]:
    """One plan in lines: its flags, its memory by stage, its step."""
    yield f"{made.flags()}"
    yield "  stage   weights  gradients  optimizer  activations     sum, GiB"
    for stage, memory in enumerate(made.memory):
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
        yield f"  {stage:5}" + "".join(f"{part / GIB:11.2f}" for part in (*parts, memory.peak))
    yield f"  step {made.time.seconds:.3f} s: {_shares(made)}; MFU {made.time.mfu(gpu):.1%}"


def as_json(made: Plan, load: Load, gpu: Gpu, samples: float, fill: float) -> dict[str, Any]:
    """A plan as plain values."""
    tokens = useful_tokens(made, load, fill)
    return {
        "flags": made.flags(),
        "memory_gib": [memory.peak / GIB for memory in made.memory],
        "step_s": made.time.seconds,
        "parts_s": made.time.parts,
        "bubble": made.time.bubble,
        "mfu": made.time.mfu(gpu),
        "tokens_per_s": tokens,
        "tokens_per_s_per_gpu": tokens / made.layout.world_size,
        "days": days(made, load, samples),
    }
