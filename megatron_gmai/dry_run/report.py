"""Dry runs of a world's typical ranks, as JSON and as text."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_gmai.config import Config
from megatron_gmai.dry_run.run import RankReport, dry_run
from megatron_gmai.dry_run.settle import settled
from megatron_gmai.layout import Layout
from megatron_gmai.planner.cost import typical_images
from megatron_gmai.planner.layout import settle_layout
from megatron_gmai.validation import validate_layout

GIB = 2**30
KINDS = ("weights", "gradients", "optimizer", "activations", "vision", "loss")


def typical_ranks(config: Config, world_size: int) -> list[int]:
    """One rank of the first, of a middle and of the last pipeline stage; the other ranks of a stage
    hold and do the same."""
    stages = Layout.of(config.parallel, world_size).pipeline
    per_stage = world_size // stages
    return [stage * per_stage for stage in sorted({0, stages // 2, stages - 1})]


def dry_runs(
    config: Config, world_size: int, images_per_pack: int, ranks: list[int] | None = None
) -> list[RankReport]:
    """A dry run of each of `ranks`, or of the typical ones. Raises ValueError for a wrong rank."""
    chosen = chosen_ranks(ranks, typical_ranks(config, world_size), world_size)
    return [dry_run(config, rank, world_size, images_per_pack) for rank in chosen]


def chosen_ranks(ranks: list[int] | None, default: Sequence[int], world_size: int) -> Sequence[int]:
    """The ranks that were asked for, or the default. Raises ValueError for a wrong one."""
    chosen = ranks or default
    if wrong := [rank for rank in chosen if not 0 <= rank < world_size]:
        raise ValueError(f"--ranks {wrong[0]}: the world has ranks 0 to {world_size - 1}")
    return chosen


def tell(config: Config, world_size: int, images_per_pack: int | None = None) -> str:
    """Dry runs of a configuration as the user gave it. Raises ValueError for a wrong layout."""
    config, images, note = prepared(config, world_size, images_per_pack)
    text = as_text(dry_runs(config, world_size, images))
    return f"{note}\n\n{text}" if note else text


def prepared(
    config: Config, world_size: int, images_per_pack: int | None
) -> tuple[Config, int, str | None]:
    """The configuration with a vocabulary and a layout, images per pack, and a line about it."""
    config = settled(config)
    images = typical_images(config) if images_per_pack is None else images_per_pack
    config, note = settle_layout(config, images)
    validate_layout(config, world_size)
    return config, images, note


def as_json(report: RankReport) -> dict[str, Any]:
    """The report as an object of plain values."""
    tree = dataclasses.asdict(report)
    for name in ("waits", "single_precision"):
        tree[name] = [{**dataclasses.asdict(w), "times": n} for w, n in getattr(report, name)]
    return tree | {"static_bytes": report.static_bytes, "peak_bytes": report.peak_bytes}


def as_text(reports: list[RankReport]) -> str:
    return "\n\n".join("\n".join(_lines(report)) for report in reports)


def _lines(report: RankReport) -> Iterator[str]:
    count = report.micro_batches
    yield (
        f"rank {report.rank}, pipeline stage {report.stage}: "
        f"{report.parameters / 1e9:.3f} B parameters, {report.trainable_parameters / 1e9:.3f} B "
        f"trained; a step of {count} micro-batches ran dry in {report.seconds:.0f} s"
    )
    yield f"  {'GiB':12}" + "".join(f"{kind:>13}" for kind in (*KINDS, "sum"))
    for name, sums in (("static", report.static), ("peak", report.peak)):
        values = [sums.get(kind, 0) for kind in KINDS]
        yield f"  {name:12}" + "".join(f"{v / GIB:13.3f}" for v in (*values, sum(values)))
    yield (
        f"  a checkpoint: {report.checkpoint_bytes / GIB:.3f} GiB written by this rank; with "
        "--async-save as much is taken of the host's memory"
    )
    yield f"  the peak is in: {report.peak_place}; the largest tensors alive then:"
    for block in report.largest:
        shape = " x ".join(map(str, block.shape))
        yield (
            f"    {block.bytes / GIB:8.3f} GiB  {block.kind:12} {block.dtype:9} [{shape}] "
            f"by {block.operator}, {block.place}"
        )
    flops = ", ".join(f"{kind} {n / 1e12:.2f}" for kind, n in report.flops.items())
    yield f"  TFLOP: {flops}; {report.launches:,} operators launched"
    yield "  collectives: group and operator, calls, MiB"
    for name, call in report.collectives.items():
        if call.ranks > 1:
            yield f"    {name:48} {call.calls:6} {call.bytes / 2**20:12.1f}"
    yield "  the host waits for the device: where, how often"
    for wait, times in report.waits:
        yield f"    {wait.file}:{wait.line} ({wait.what.lstrip('_')}) {times}"
    for wait, times in report.single_precision:
        yield f"  matrix product in fp32: {wait.file}:{wait.line} ({wait.what}) {times}"
