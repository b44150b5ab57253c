"""The code that GPUs run, without one: what a dry run finds, and layouts of one and two ranks."""

import dataclasses
from collections.abc import Callable
from unittest import mock

import pytest
import torch

from megatron_gmai.dry_run import run
from megatron_gmai.dry_run.report import as_json, as_text
from megatron_gmai.dry_run.run import dry_run
from megatron_gmai.layout import Layout
from megatron_gmai.model.projector import Projector
from tests.dry_run.gpu_path import IMAGES, check_gpu_path, unexpected
from tests.parallel.cases import Case
from tests.parallel.test_parity import CASES

EVERY_CASE = [pytest.param(size, case, id=case.name) for size in (1, 2) for case in CASES[size]]


@pytest.mark.parametrize(("size", "case"), EVERY_CASE)
def test_the_gpu_path_neither_waits_nor_computes_in_fp32(size: int, case: Case) -> None:
    check_gpu_path(size, case)


def projector_with(change: Callable[[torch.Tensor], torch.Tensor]):
    forward = Projector.forward

    def changed(self: Projector, features: torch.Tensor) -> torch.Tensor:
        return change(forward(self, features))

    return mock.patch.object(Projector, "forward", changed)


CASE = CASES[1][0]


def test_a_cpu_tensor_on_the_way_ends_the_dry_run() -> None:
    with (
        projector_with(lambda x: x + torch.ones(x.size(-1))),
        pytest.raises(RuntimeError, match="device"),
    ):
        dry_run(CASE.config, 0, 1, IMAGES)


def test_a_read_by_the_host_is_told_with_its_place() -> None:
    with projector_with(lambda x: x * x.sum().item()):
        report = dry_run(CASE.config, 0, 1, IMAGES)
    (place,) = unexpected(report)
    assert "test_gpu_path.py" in place


def test_a_product_in_fp32_is_told_with_its_place() -> None:
    with projector_with(lambda x: (x.float() @ torch.eye(x.size(-1), device=x.device)).to(x.dtype)):
        report = dry_run(CASE.config, 0, 1, IMAGES)
    assert any("test_gpu_path.py" in wait.file for wait, _ in report.single_precision)


def test_the_report_names_what_the_peak_is_made_of() -> None:
    report = dry_run(CASE.config, 0, 1, IMAGES)
    text, tree = as_text([report]), as_json(report)
    assert "rank 0, pipeline stage 0" in text
    assert tree["peak_bytes"] == sum(tree["peak"].values())
    assert len(tree["largest"]) == 10
    assert report.peak_place in text


def test_more_images_cost_vision_memory_and_nothing_else_static() -> None:
    config = dataclasses.replace(CASE.config)
    none, many = (dry_run(config, 0, 1, images) for images in (0, 3))
    assert none.static == many.static
    assert many.peak["vision"] > none.peak.get("vision", 0)


@pytest.mark.parametrize("name", ["pp2-all-ranks-phase2", "vpp2-tp2-all-ranks-phase3"])
def test_the_last_micro_batches_of_a_step_have_the_peak_of_all_of_them(name: str) -> None:
    """Where the features of all of a step's images are in memory together."""
    size, case = next((n, c) for n in CASES for c in CASES[n] if c.name == name)
    train = dataclasses.replace(case.config.train, global_batch_size=16)
    config = dataclasses.replace(case.config, train=train)
    for rank in (0, size - 1):
        few = dry_run(config, rank, size, IMAGES)
        whole = Layout.of(config.parallel, size).micro_batches(train)
        with mock.patch.object(run, "micro_batches", lambda *unused, count=whole: count):
            all_of_them = dry_run(config, rank, size, IMAGES)
        assert few.micro_batches < all_of_them.micro_batches == whole
        assert (few.static, few.peak_place) == (all_of_them.static, all_of_them.peak_place)
        # Each micro-batch leaves a loss, and how long its segments are: a few numbers.
        assert few.peak == pytest.approx(all_of_them.peak, abs=16 * whole)
