"""The planner's arithmetic: schedules, balance, memory against dry runs, and its choice."""

import dataclasses
import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from megatron_gmai.cli import parse
from megatron_gmai.config import Config, LoraConfig, ParallelConfig
from megatron_gmai.dry_run.run import dry_run
from megatron_gmai.layout import Layout, chunks_of_rank
from megatron_gmai.planner.cost import (
    Load,
    load_of,
    step_flops,
    tower_flops,
    typical_images,
    with_vocabulary,
)
from megatron_gmai.planner.figure import timeline_svg
from megatron_gmai.planner.hardware import GPUS, gpu_called, gpu_of_driver
from megatron_gmai.planner.layout import balanced_layers, imbalance, settle_layout
from megatron_gmai.planner.memory import is_trained, stage_memory
from megatron_gmai.planner.schedule import order, simulate
from megatron_gmai.planner.search import Plan, plan, search
from megatron_gmai.planner.share import Share
from megatron_gmai.planner.speed import pass_seconds, step_time, transfer
from megatron_gmai.presets import preset
from megatron_gmai.weights import weights
from tools.dry_run import main as dry_run_main
from tools.plan import main

SEVEN_B = with_vocabulary(preset("gmai-vl-7b"))


def with_parallel(config: Config, **sizes: object) -> Config:
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **sizes))  # type: ignore[arg-type]


@pytest.mark.parametrize(("stages", "count"), [(2, 2), (4, 8), (8, 64)])
@pytest.mark.parametrize("virtual", [1, 2, 4])
def test_the_bubble_of_uniform_stages_is_the_closed_form(
    stages: int, virtual: int, count: int
) -> None:
    chunks = stages * virtual
    timeline = simulate(stages, virtual, count, [1.0 / virtual] * chunks, [2.0 / virtual] * chunks)
    assert timeline.seconds == pytest.approx(3 * (count + (stages - 1) / virtual))
    assert timeline.bubble == pytest.approx((stages - 1) / (virtual * count + stages - 1))


@pytest.mark.parametrize(("stages", "virtual"), [(1, 1), (4, 1), (4, 2)])
def test_every_pass_runs_once_and_forward_before_backward(stages: int, virtual: int) -> None:
    for stage in range(stages):
        passes = order(stage, stages, virtual, 8)
        assert len(passes) == len(set(passes)) == 2 * 8 * virtual
        for work in passes:
            if not work.forward:
                forward = work._replace(forward=True)
                assert passes.index(forward) < passes.index(work)


def test_a_slow_stage_sets_the_pace() -> None:
    even = simulate(4, 1, 16, [1.0] * 4, [2.0] * 4)
    uneven = simulate(4, 1, 16, [1.0, 1.5, 1.0, 0.5], [2.0, 3.0, 2.0, 1.0])
    assert uneven.seconds > even.seconds
    assert uneven.seconds >= 16 * 4.5


class TestAutomaticLayout:
    def test_the_first_and_last_stage_get_fewer_layers(self) -> None:
        config = with_parallel(SEVEN_B, pipeline_model_parallel_size=8)
        layers = balanced_layers(config, load_of(config, 3))
        assert sum(layers) == 32
        assert layers[0] < max(layers) and layers[-1] < max(layers)

    def test_no_other_split_is_better(self) -> None:
        config = with_parallel(SEVEN_B, pipeline_model_parallel_size=3)
        load = load_of(config, 2)
        best = imbalance(config, balanced_layers(config, load), load)
        others = [(a, b, 32 - a - b) for a in range(0, 31) for b in range(1, 32 - a)]
        assert best == pytest.approx(min(imbalance(config, split, load) for split in others))

    def test_text_alone_leaves_the_first_stage_its_layers(self) -> None:
        config = with_parallel(SEVEN_B, pipeline_model_parallel_size=4)
        assert balanced_layers(config, load_of(config, 0))[0] >= 8

    def test_images_on_all_ranks_leave_the_first_stage_its_layers(self) -> None:
        config = with_parallel(SEVEN_B, pipeline_model_parallel_size=4, vision_phase="all-ranks")
        assert balanced_layers(config, load_of(config, 3))[0] >= 8

    def test_auto_becomes_a_list_and_a_line(self) -> None:
        config = with_parallel(SEVEN_B, pipeline_model_parallel_size=4, pipeline_layout="auto")
        settled, note = settle_layout(config, 3)
        assert settled.parallel.pipeline_layout == "7,9,9,7"
        assert note is not None and "7,9,9,7" in note and "x the mean" in note

    def test_a_list_stays_as_it_is(self) -> None:
        config = with_parallel(SEVEN_B, pipeline_model_parallel_size=2, pipeline_layout="15,17")
        assert settle_layout(config, 3) == (config, None)

    def test_too_many_stages_are_refused(self) -> None:
        config = with_parallel(SEVEN_B, pipeline_model_parallel_size=64, pipeline_layout="auto")
        with pytest.raises(ValueError, match="64 chunks"):
            settle_layout(config, 1)


def test_model_flops_are_six_times_parameters_and_tokens_but_for_attention() -> None:
    parameters = 32 * 218_103_808 + 92_544 * 4096  # of the decoder's and output layer's matrices
    found = step_flops(SEVEN_B, tokens=2048, images=0, samples=2048)
    assert found == pytest.approx(6 * parameters * 2048, rel=1e-3)


def test_frozen_parts_cost_no_backward_pass() -> None:
    frozen = dataclasses.replace(SEVEN_B.train, freeze_vit=True, freeze_llm=True)
    first = dataclasses.replace(SEVEN_B, train=frozen)
    whole, part = (step_flops(c, 2048, 3, 3) for c in (SEVEN_B, first))
    assert part < 0.67 * whole


@pytest.mark.parametrize("gpu", GPUS.values(), ids=str)
def test_predicted_shares_of_the_peak_are_possible(gpu: object) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )
    config = dataclasses.replace(SEVEN_B, parallel=parallel)
    assert 0.2 < plan(config, 64, load_of(config, 3), gpu).time.mfu(gpu) < 0.7  # type: ignore[arg-type]


def test_the_published_figure_that_the_table_was_set_by() -> None:
    """Megatron-LM, 7.1B, TP 2, sequence 4096 on H100s: 47 %."""
    config = dataclasses.replace(
        SEVEN_B,
        data=dataclasses.replace(SEVEN_B.data, max_length=4096),
        train=dataclasses.replace(
            SEVEN_B.train, global_batch_size=256, freeze_vit=True, freeze_projector=True
        ),
        parallel=ParallelConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
    )
    gpu = gpu_called("h100-80gb")
    found = plan(config, 64, Load(4096, 1, 0), gpu).time.mfu(gpu)
    assert found == pytest.approx(0.47, abs=0.02)


def test_a_search_puts_the_fastest_that_fits_first() -> None:
    config = with_vocabulary(preset("gmai-vl-tiny"))
    gpu = gpu_called("h100-80gb")
    found = search(config, 4, load_of(config, 3), gpu)
    seconds = [made.time.seconds for made in found.plans]
    assert seconds == sorted(seconds) and len(seconds) > 5
    assert all(made.peak_gib <= gpu.memory_gib for made in found.plans)
    assert all(made.layout.world_size == 4 for made in found.plans)


def plans_of(config: Config, images: float) -> list[Plan]:
    return search(config, 4, load_of(config, images), gpu_called("h100-80gb")).plans


def test_devices_are_known_by_their_drivers_names() -> None:
    assert gpu_of_driver("NVIDIA H100 80GB HBM3") == GPUS["h100-80gb"]
    assert gpu_of_driver("NVIDIA H100 PCIe") is None
    assert gpu_of_driver("a processor") is None


def test_the_program_prints_a_table_and_confirms_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure, table = tmp_path / "pipeline.svg", tmp_path / "plan.json"
    flags = ["--preset", "gmai-vl-tiny", "--gpus", "2", "--confirm", "1", "--explain", "1"]
    assert main([*flags, "--figure", str(figure), "--json", str(table)]) == 0
    printed = capsys.readouterr().out
    assert "tokens/s/GPU" in printed and "First:" in printed and "dry run of" in printed
    (first, *_) = json.loads(table.read_text())["plans"]
    for stage in first["dry_run"]:
        assert stage["predicted_gib"] == pytest.approx(stage["counted_gib"], rel=0.05)
    assert xml.etree.ElementTree.parse(figure).getroot().tag.endswith("svg")


def test_adapters_take_the_place_of_their_towers_gradients_and_state(tmp_path: Path) -> None:
    """Bytes of state are those that a dry run counts, the peak is close to it."""
    flags = ["--preset", "gmai-vl-tiny", "--tp", "2", "--pp", "2", "--sequence-parallel"]
    lora = [*flags, "--use-distributed-optimizer", "--llm-use-lora", "--vit-use-lora"]
    lora += ["--lora-dropout", "0.1"]
    file = tmp_path / "dry.json"
    assert dry_run_main([*lora, "--world-size", "4", "--dtype", "bf16", "--json", str(file)]) == 0
    config = with_vocabulary(parse([*lora, "--dtype", "bf16"]).config)
    layout, load = Layout.of(config.parallel, 4), load_of(config, typical_images(config))
    for report in json.loads(file.read_text()):
        found = stage_memory(config, layout, report["stage"], load)
        static = report["static"]
        # A dry run sees the model's constants as well: frequencies of the rotary angles, and on the
        # first stage the tower's position numbers (37 int64) and pixel means and deviations.
        constants = 16 * 4 + (37 * 8 + 2 * 3 * 4 if report["stage"] == 0 else 0)
        assert found.weights + constants == static["weights"]
        assert found.gradients == pytest.approx(static["gradients"], rel=0.01)
        assert found.optimizer == pytest.approx(static["optimizer"], rel=0.01)
        assert found.peak == pytest.approx(report["peak_bytes"], rel=0.05)
        table = [w for w in weights(config.model, config.lora).values() if is_trained(config, w)]
        assert all(w.is_adapter or w.tower == "projector" for w in table)


def test_adapters_cost_no_gradients_of_the_weights_below_them() -> None:
    lora = dataclasses.replace(SEVEN_B, lora=LoraConfig(llm_use_lora=True))
    whole, part = (step_flops(c, 2048, 0, 1) for c in (SEVEN_B, lora))
    assert part == pytest.approx(whole * 2 / 3)
    lora = dataclasses.replace(SEVEN_B, lora=LoraConfig(vit_use_lora=True))
    whole, part = (step_flops(c, 0, 1, 1) for c in (SEVEN_B, lora))
    assert whole - part == pytest.approx(tower_flops(SEVEN_B.model))


def test_adapters_take_time_by_their_number_and_rank() -> None:
    layout, load = Layout(8, 2, 1), load_of(SEVEN_B, 3)

    def seconds(**lora: Any) -> float:
        config = dataclasses.replace(SEVEN_B, lora=LoraConfig(**lora))
        return step_time(config, layout, load, GPUS["h100-80gb"]).seconds

    one, all_of_them = (
        seconds(llm_use_lora=True, lora_targets=targets) for targets in ("qkv", "qkv,proj,fc1,fc2")
    )
    wide = seconds(llm_use_lora=True, lora_targets="qkv,proj,fc1,fc2", lora_rank=256)
    assert one < seconds() and one < all_of_them < wide
    one, all_of_them = (
        seconds(vit_use_lora=True, lora_targets=targets) for targets in ("qkv", "qkv,proj,fc1,fc2")
    )
    assert one < all_of_them  # in a tower of few images, launches count and not products


def test_what_cannot_fit_is_told_with_the_smallest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "gmai-vl-7b", "--gpus", "1", "--gpu", "a100-40gb"]) == 1
    assert "use more GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(("phase", "at_once"), [(1, 4), (3, 64)])
def test_images_on_all_ranks_take_what_a_dry_run_counts(phase: int, at_once: int) -> None:
    """With more images a rank than go through the tower at once, and with fewer."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        sequence_parallel=True,
        use_distributed_optimizer=True,
        vision_phase="all-ranks",
    )
    config = with_vocabulary(preset("gmai-vl-tiny"))
    train = dataclasses.replace(
        config.train,
        global_batch_size=48,
        freeze_llm=phase < 3,
        freeze_vit=phase < 2,
        vit_micro_batch_size=at_once,
    )
    config = dataclasses.replace(config, parallel=parallel, train=train)
    for stage in (0, 1):
        counted = dry_run(config, 2 * stage, 4, 2)
        predicted = stage_memory(config, Layout(4, 2, 2), stage, load_of(config, 2))
        assert predicted.peak == pytest.approx(counted.peak_bytes, rel=0.05)


def test_both_vision_phases_are_judged_where_there_are_stages() -> None:
    config = with_vocabulary(preset("gmai-vl-tiny"))
    phases = {(p.layout.pipeline > 1, p.config.parallel.vision_phase) for p in plans_of(config, 3)}
    assert phases == {(False, "first-stage"), (True, "first-stage"), (True, "all-ranks")}
    assert {p.config.parallel.vision_phase for p in plans_of(config, 0)} == {"first-stage"}
    ahead = with_parallel(config, vision_phase="all-ranks")
    assert {p.config.parallel.vision_phase for p in plans_of(ahead, 3)} == {"all-ranks"}


def test_the_picture_has_a_box_for_every_pass() -> None:
    timeline = simulate(2, 1, 4, [1.0, 1.0], [2.0, 2.0])
    assert timeline_svg(timeline, "a < b").count("<rect") == 1 + len(timeline.intervals) + 2
    assert Layout(4, 2, 2).data == 1


def test_a_long_step_repeats_its_middle() -> None:
    config = dataclasses.replace(
        SEVEN_B,
        parallel=ParallelConfig(pipeline_model_parallel_size=4, pipeline_layout="7,9,9,7"),
    )
    time = plan(config, 4, load_of(config, 3), gpu_called("h200")).time
    share = Share(config, load_of(config, 3), Layout(4, 1, 4))
    chunks = [chunks_of_rank(config.parallel, 32, stage)[0] for stage in range(4)]
    forward, backward = (
        [pass_seconds(share, chunk, gpu_called("h200"), way) for chunk in chunks]
        for way in ("forward", "backward")
    )
    whole = simulate(4, 1, 512, forward, backward, transfer(share, gpu_called("h200")))
    assert time.parts["pipeline"] == pytest.approx(whole.seconds)
    assert time.bubble == pytest.approx(whole.bubble)


def test_the_tower_is_recomputed_where_memory_asks_for_it() -> None:
    config, gpu = with_vocabulary(preset("gmai-vl-tiny")), gpu_called("h100-80gb")
    load = load_of(config, 3)
    (plain, *_) = search(config, 1, load, gpu).plans
    assert not plain.config.train.recompute_vit
    again = dataclasses.replace(plain.config.train, recompute_vit=True)
    least = plan(dataclasses.replace(plain.config, train=again), 1, load, gpu).peak_gib
    assert least < plain.peak_gib
    small = dataclasses.replace(gpu, memory_gib=(least + plain.peak_gib) / 2)
    assert any("--recompute-vit" in p.flags() for p in search(config, 1, load, small).plans)
