"""What a run sends to W&B, MLflow and OpenTelemetry, seen by recording stand-ins of them."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from megatron_gmai.config import Config
from megatron_gmai.observe import sinks
from megatron_gmai.observe.sinks import Sinks, identity, open_sinks
from megatron_gmai.training.metrics import MetricsLog
from megatron_gmai.training.step import Evaluated
from tests.training.test_schedule_and_metrics import row


def config_of(work_dir: Path, **settings: Any) -> Config:
    config = Config()
    run = dataclasses.replace(config.run, work_dir=str(work_dir), **settings)
    return dataclasses.replace(config, run=run)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, MagicMock]:
    """Stand-ins of the packages, which only this test has installed."""
    found = {"wandb": MagicMock(), "mlflow": MagicMock(), "opentelemetry.metrics": MagicMock()}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sinks, "is_installed", lambda name: True)
    return found


def write_two_rows(folder: Path, opened: Sinks) -> None:
    log = MetricsLog(folder, folder / "tensorboard", 0, 10, 1, opened)
    log.write(row(1))
    log.write(row(2))
    log.write_validation(2, {"a/b": Evaluated(0.5, 10, 3, 0)})
    log.close()


def test_wandb_gets_rows_and_a_resumed_run_is_the_same_one(
    tmp_path: Path, packages: dict[str, MagicMock]
) -> None:
    config = config_of(tmp_path, wandb_project="gmai")
    write_two_rows(tmp_path, open_sinks(config, 2))
    run = packages["wandb"].init.return_value
    steps = [call.kwargs["step"] for call in run.log.call_args_list]
    assert steps == [1, 2, 2]
    assert run.log.call_args_list[0].args[0]["loss"] == 1 / 3
    assert run.log.call_args_list[2].args[0] == {"valid_loss/a/b": 0.5}
    run.finish.assert_called_once()
    open_sinks(config, 2)
    first, second = packages["wandb"].init.call_args_list
    assert first.kwargs["id"] == second.kwargs["id"] == identity(tmp_path)
    assert first.kwargs["config"]["train.lr"] == config.train.lr


def test_mlflow_goes_on_in_the_run_that_it_finds(
    tmp_path: Path, packages: dict[str, MagicMock]
) -> None:
    mlflow, config = packages["mlflow"], config_of(tmp_path, mlflow_experiment="gmai")
    mlflow.search_runs.return_value = []
    write_two_rows(tmp_path, open_sinks(config, 2))
    assert mlflow.start_run.call_args.kwargs["tags"] == {"work_dir": identity(tmp_path)}
    assert mlflow.log_metrics.call_args_list[1].args[0]["grad_norm"] == 2 / 3
    mlflow.search_runs.return_value = [SimpleNamespace(info=SimpleNamespace(run_id="7"))]
    open_sinks(config, 2)
    assert mlflow.start_run.call_args.kwargs == {"run_id": "7"}


def test_opentelemetry_gets_megatron_cores_names(
    tmp_path: Path, packages: dict[str, MagicMock]
) -> None:
    meter = packages["opentelemetry.metrics"].get_meter.return_value
    told: dict[str, list[float]] = {}

    def instrument(method: str) -> Any:
        def create(name: str, **_: str) -> SimpleNamespace:
            return SimpleNamespace(**{method: told.setdefault(name, []).append})

        return create

    meter.create_gauge = instrument("set")
    meter.create_histogram = instrument("record")
    meter.create_counter = instrument("add")
    write_two_rows(tmp_path, open_sinks(config_of(tmp_path), processes=2))
    assert told["megatron.training.loss"] == [1 / 3, 1 / 3]
    assert told["megatron.training.step_duration_ms"] == [2000.0, 2000.0]
    assert told["megatron.training.memory_allocated_gb"] == [1.0, 1.0]
    assert told["megatron.training.skipped_iters"] == [0, 0]
    assert len(told) == 8


def test_a_sink_that_fails_is_told_once_and_left_out(
    tmp_path: Path, packages: dict[str, MagicMock], capsys: pytest.CaptureFixture[str]
) -> None:
    packages["wandb"].init.return_value.log.side_effect = OSError("no network")
    write_two_rows(tmp_path, open_sinks(config_of(tmp_path, wandb_project="gmai"), 2))
    assert capsys.readouterr().out.count("WandbSink is left out from here on: no network") == 1
    assert packages["wandb"].init.return_value.log.call_count == 1


def test_a_package_that_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "is_installed", lambda name: False)
    with pytest.raises(ValueError, match="--wandb-project needs .*: pip install wandb"):
        open_sinks(config_of(tmp_path, wandb_project="gmai"), 2)
    assert open_sinks(config_of(tmp_path), 2).sinks == []
