"""Finds the fastest layout of a training phase that fits on so many GPUs.

    python tools/plan.py --preset gmai-vl-7b --gpus 64 --gpu h100-80gb --phase 3

Every layout is judged by formulas for its memory and a simulation of its pipeline; the best three
are then confirmed by dry runs of the real code (--confirm N). No GPU is needed.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

from megatron_gmai.cli import parse
from megatron_gmai.config import Config
from megatron_gmai.data.shards.mean_load import pack_means
from megatron_gmai.planner.cost import Load, typical_images, with_vocabulary
from megatron_gmai.planner.hardware import GPUS, gpu_called
from megatron_gmai.planner.search import GIB, Plan, search
from megatron_gmai.planner.tell import PHASE_SAMPLES, as_json, explain, table, why

FROZEN = {1: ("--freeze-llm", "--freeze-vit"), 2: ("--freeze-llm",), 3: ()}


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], epilog="All flags of pretrain_gmai_vl.py too."
    )
    flags.add_argument("--gpus", type=int, required=True, help="GPUs of the run")
    flags.add_argument("--gpu", choices=sorted(GPUS), default="h100-80gb", help="their kind")
    flags.add_argument("--phase", "--stage", type=int, choices=(1, 2, 3), default=3)
    flags.add_argument(
        "--images-per-pack", type=float, help="mean over the data (default: packs full of images)"
    )
    flags.add_argument("--samples-per-pack", type=float, help="(default: one an image)")
    flags.add_argument("--fill", type=float, help="share of a pack that is used (0.98)")
    flags.add_argument("--top", type=int, default=10, help="rows of the table (10)")
    flags.add_argument("--confirm", type=int, default=3, help="of which dry runs confirm so many")
    flags.add_argument("--explain", type=int, metavar="N", help="tell more about row N")
    flags.add_argument("--figure", type=Path, help="draw that row's pipeline (SVG; or the first's)")
    flags.add_argument("--json", type=Path, help="write the table here")
    return flags


def main(argv: list[str] | None = None) -> int:
    own, rest = parser().parse_known_args(argv)
    try:
        config = with_vocabulary(parse([*rest, *FROZEN[own.phase]]).config)
        load, fill, samples = data_for(config, own)
        gpu = gpu_called(own.gpu)
        found = search(config, own.gpus, load, gpu)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    if not found.plans:
        print(nothing_fits(found.too_large, gpu.memory_gib), file=sys.stderr)
        return 1
    best = found.plans[: own.top]
    print(table(best, load, gpu, samples, fill))
    print(why(found, gpu))
    chosen = best[(own.explain or 1) - 1]
    if own.explain:
        print("\n".join(explain(chosen, gpu)))
    rows = [as_json(made, load, gpu, samples, fill) for made in best]
    for made, row in zip(best[: own.confirm], rows, strict=False):
        row["dry_run"] = confirm(made, load)
        print(confirmation(made, row["dry_run"]), flush=True)
    if own.figure:
        from megatron_gmai.planner.figure import timeline_svg

        own.figure.write_text(timeline_svg(chosen.time.timeline, chosen.flags()))
    if own.json:
        own.json.write_text(json.dumps({"gpu": gpu.name, "plans": rows}, indent=2) + "\n")
    return 0


def data_for(config: Config, own: argparse.Namespace) -> tuple[Load, float, float]:
    """What a pack holds, how full it is, and the samples of the phase: of `--shards` where they
    are given, else typical ones; the other flags win over both."""
    images, segments, fill = own.images_per_pack, own.samples_per_pack, own.fill
    samples = PHASE_SAMPLES[own.phase]
    if config.data.shards is not None:
        means = pack_means(Path(config.data.shards), config.data)
        samples = means.epoch_samples
        images = means.images if images is None else images
        segments, fill = segments or means.samples, fill or means.fill
        print(
            f"{config.data.shards}: {samples:,.0f} samples an epoch; a pack of "
            f"{config.data.max_length} tokens has {images:.2f} images and {segments:.2f} samples "
            f"and is {fill:.1%} full"
        )
    images = typical_images(config) if images is None else images
    load = Load(config.data.max_length, segments or max(1.0, images), images)
    return load, fill or 0.98, samples


def nothing_fits(plans: list[Plan], limit: float) -> str:
    if not plans:
        return "plan: no layout divides this number of GPUs and this batch"
    least = plans[0]
    return (
        f"plan: no layout fits into {limit:g} GiB; the smallest takes {least.peak_gib:.1f} GiB "
        f"({least.flags()}): use more GPUs, or larger ones"
    )


def confirm(made: Plan, load: Load) -> list[dict[str, float]]:
    """Peak memory by dry runs, beside what was predicted, of a first, middle and last stage."""
    from megatron_gmai.runtime.quiet import quiet_libraries

    quiet_libraries()
    from megatron_gmai.dry_run.report import dry_runs

    config = made.config
    run = dataclasses.replace(config.run, dtype="bf16")
    reports = dry_runs(
        dataclasses.replace(config, run=run), made.layout.world_size, math.ceil(load.images)
    )
    return [
        {
            "stage": report.stage,
            "counted_gib": report.peak_bytes / GIB,
            "predicted_gib": made.memory[report.stage].peak / GIB,
        }
        for report in reports
    ]


def confirmation(made: Plan, counted: list[dict[str, float]]) -> str:
    stages = ", ".join(
        f"stage {c['stage']} {c['counted_gib']:.2f} GiB (predicted {c['predicted_gib']:.2f})"
        for c in counted
    )
    return f"dry run of {made.flags()}: {stages}"


if __name__ == "__main__":
    sys.exit(main())
