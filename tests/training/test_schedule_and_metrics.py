"""The learning rate's curve, the steps between checkpoints, and the rows of a run."""

import dataclasses
import json
from pathlib import Path
from unittest import mock

import pytest

from megatron_gmai.config import TrainConfig
from megatron_gmai.planner.cost import Load, with_vocabulary
from megatron_gmai.planner.hardware import gpu_called
from megatron_gmai.planner.search import plan
from megatron_gmai.presets import preset
from megatron_gmai.training.loop import checkpoint_steps, predicted
from megatron_gmai.training.metrics import MetricsLog, Row, make_row
from megatron_gmai.training.optimizer import learning_rate
from megatron_gmai.training.step import StepResult

KEYS = [
    "iteration", "loss", "lr", "grad_norm", "supervised_tokens", "tokens", "images", "samples",
    "pack_fill", "step_time_s", "tokens_per_s", "peak_memory_bytes",
    "skipped_steps", "save_time_s", "model_flops_per_s", "mfu", "data_wait_s",
    "stages", "stragglers", "predicted_step_time_s",
]  # fmt: skip
RESULT = StepResult(
    loss=1 / 3,
    grad_norm=2 / 3,
    supervised_tokens=100,
    tokens=300,
    positions=400,
    images=5,
    samples=7,
    updated=True,
)


def row(iteration: int) -> Row:
    return make_row(iteration, RESULT, lr=1e-3, seconds=2.0, memory=2**30)


def open_log(folder: Path, start: int, total: int = 10, interval: int = 1) -> MetricsLog:
    return MetricsLog(folder, folder / "tensorboard", start, total, interval)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_rate_rises_linearly_then_falls_as_a_cosine() -> None:
    train = TrainConfig(lr=1.0, min_lr=0.1, warmup_ratio=0.1)
    rates = [learning_rate(step, 100, train) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 11 for step in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)  # half way: the mean of peak and end
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[99] < 0.101


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    train = TrainConfig(lr=1.0, warmup_ratio=0.0)
    rates = [learning_rate(step, 4, train) for step in range(1, 5)]
    assert rates == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 5])
def test_every_step_of_a_short_run_moves_the_weights(total: int, warmup: float) -> None:
    train = TrainConfig(lr=2.0, warmup_ratio=warmup)
    assert all(0 < learning_rate(step, total, train) <= 2.0 for step in range(1, total + 1))


@pytest.mark.parametrize(
    ("interval", "total", "steps"),
    [(-1, 70, 70), (0.1, 70, 7), (0.001, 70, 1), (1, 70, 1), (30, 70, 30)],
)
def test_the_checkpoint_interval_is_a_share_or_a_number_of_steps(
    interval: float, total: int, steps: int
) -> None:
    assert checkpoint_steps(interval, total) == steps


def test_a_row_has_the_documented_keys_and_full_precision(tmp_path: Path) -> None:
    log = open_log(tmp_path, start=0)
    log.write(row(1))
    log.close()
    (found,) = rows_of(tmp_path)
    assert list(found) == KEYS
    assert found["loss"] == 1 / 3
    assert found["pack_fill"] == 0.75
    assert found["tokens_per_s"] == 150


def test_the_line_tells_what_a_person_wants_to_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_log(tmp_path, start=0).write(row(1))
    line = capsys.readouterr().out
    for part in ("step 1/10", "loss 0.3333", "lr 1.00e-03", "grad norm 0.667", "150 tokens/s",
                 "(50 supervised)", "2.5 images/s", "fill 75.0%", "1.00 GiB", "left"):  # fmt: skip
        assert part in line


def test_rows_past_the_start_are_dropped_when_a_run_resumes(tmp_path: Path) -> None:
    first = open_log(tmp_path, start=0)
    for iteration in range(1, 7):
        first.write(row(iteration))
    first.close()
    resumed = open_log(tmp_path, start=4)
    for iteration in range(5, 8):
        resumed.write(row(iteration))
    resumed.close()
    assert [found["iteration"] for found in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_row_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    first = open_log(tmp_path, start=0)
    first.write(row(1))
    first.write(row(2))
    first.close()
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text()[:-20])
    open_log(tmp_path, start=5).close()
    assert [found["iteration"] for found in rows_of(tmp_path)] == [1]


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    log = open_log(tmp_path, start=0)
    log.write(row(1))
    log.close()
    open_log(tmp_path, start=0).close()
    assert rows_of(tmp_path) == []


def test_on_a_full_disk_no_events_are_tried(tmp_path: Path) -> None:
    """TensorBoard's thread would print a traceback for every row."""
    full = OSError(28, "No space left on device")
    with mock.patch("megatron_gmai.training.metrics.write_atomically", side_effect=full):
        log = open_log(tmp_path, start=0)
        log.write(row(1))
    assert not list(tmp_path.rglob("events*"))
    log.write(row(2))
    log.close()
    assert len(list(tmp_path.rglob("events*"))) == 1


def test_only_every_interval_and_the_last_step_are_written(tmp_path: Path) -> None:
    log = open_log(tmp_path, start=0, total=7, interval=3)
    for iteration in range(1, 8):
        log.write(row(iteration))
    log.close()
    assert [found["iteration"] for found in rows_of(tmp_path)] == [3, 6, 7]


def test_the_line_tells_the_share_of_the_peak_where_it_is_known(tmp_path: Path) -> None:
    log = open_log(tmp_path, start=0)
    known = make_row(1, RESULT, lr=1e-3, seconds=2.0, memory=2**30, flops=4e14, peak=1e15)
    unknown = make_row(1, RESULT, lr=1e-3, seconds=2.0, memory=2**30, flops=4e14)
    assert "200 TFLOP/s (MFU 20.0%)" in log.line(known)
    assert "200 TFLOP/s |" in log.line(unknown)
    assert (known.mfu, unknown.mfu) == (0.2, None)
    planned = make_row(1, RESULT, 1e-3, 2.0, 2**30, flops=4e14, peak=1e15, predicted=1.6)
    assert "(MFU 20.0%, predicted 25.0%: 2 s, predicted 1.6)" in log.line(planned)
    assert "7 samples" in log.line(planned)
    log.close()


def test_the_prediction_of_a_logged_step_is_the_planners() -> None:
    config, gpu = with_vocabulary(preset("gmai-vl-7b")), gpu_called("h100-80gb")
    packs = config.train.global_batch_size
    result = dataclasses.replace(RESULT, samples=3 * packs, images=3 * packs)
    adapters = dataclasses.replace(config, lora=dataclasses.replace(config.lora, llm_use_lora=True))
    for trained in (config, adapters):
        made = plan(trained, 8, Load(config.data.max_length, 3, 3), gpu)
        assert predicted(trained, made.layout, result, gpu) == made.time.seconds
