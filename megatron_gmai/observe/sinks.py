"""Where else the metrics of a run go: Weights & Biases, MLflow, OpenTelemetry; none is required.

A sink takes numbers by name at a step. It has no say in the run: one that fails is told once and
left out from then on. Only the rank that logs opens sinks.
"""

import dataclasses
import importlib
import importlib.util
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from megatron_gmai.config import Config

# megatron-core's names (megatron/core/telemetry), from 0.19 on -> our row's and the factor between
OTEL_GAUGES = {
    "megatron.training.loss": ("loss", 1.0),
    "megatron.training.grad_norm": ("grad_norm", 1.0),
    "megatron.training.learning_rate": ("lr", 1.0),
    "megatron.training.tokens_per_sec": ("tokens_per_s", 1.0),
    "megatron.training.memory_allocated_gb": ("peak_memory_bytes", 2.0**-30),
}
OTEL_DURATION = "megatron.training.step_duration_ms"
OTEL_FLOPS = "megatron.training.throughput_tflops"
OTEL_SKIPPED = "megatron.training.skipped_iters"


class Sink(Protocol):
    """Takes the metrics of a run."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step; `valid_loss/NAME` among them after a validation."""

    def close(self) -> None:
        """The run ends, or stops for now."""


class WandbSink:
    """A run of Weights & Biases; a resumed run goes on in the same one."""

    def __init__(self, wandb: ModuleType, config: Config) -> None:
        run, work_dir = config.run, Path(config.run.work_dir).absolute()
        self.run = wandb.init(
            project=run.wandb_project,
            name=run.wandb_exp_name or work_dir.name,
            id=identity(work_dir),
            resume="allow",
            dir=str(work_dir),
            config=flat(config),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class MlflowSink:
    """A run of MLflow, found again by its name; MLFLOW_TRACKING_URI says where."""

    def __init__(self, mlflow: ModuleType, config: Config) -> None:
        work_dir = Path(config.run.work_dir).absolute()
        name = identity(work_dir)
        mlflow.set_experiment(config.run.mlflow_experiment)
        earlier = mlflow.search_runs(
            experiment_names=[config.run.mlflow_experiment],
            filter_string=f"tags.work_dir = '{name}'",
            output_format="list",
        )
        self.mlflow = mlflow
        if earlier:
            mlflow.start_run(run_id=earlier[0].info.run_id)
            return
        mlflow.start_run(run_name=work_dir.name, tags={"work_dir": name})
        mlflow.log_params({key: str(value)[:500] for key, value in flat(config).items()})

    def log(self, values: Mapping[str, float], step: int) -> None:
        # A slash in a name makes a folder there, and few other signs are allowed.
        clean = {"".join(c if c.isalnum() or c in "_-. /" else "_" for c in k): v
                 for k, v in values.items()}  # fmt: skip
        self.mlflow.log_metrics(clean, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


class OtelSink:
    """OpenTelemetry's instruments under megatron-core's names, through the process's own provider
    (that of `opentelemetry-instrument`, say); without one they go nowhere."""

    def __init__(self, metrics: Any, processes: int) -> None:
        meter = metrics.get_meter("megatron_gmai")
        self.gauges = {name: meter.create_gauge(name) for name in (*OTEL_GAUGES, OTEL_FLOPS)}
        self.duration = meter.create_histogram(OTEL_DURATION, unit="ms")
        self.skipped = meter.create_counter(OTEL_SKIPPED)
        self.processes, self.skipped_before = processes, 0.0

    def log(self, values: Mapping[str, float], step: int) -> None:
        if "loss" not in values:  # of a validation, for which megatron-core has no name
            return
        for name, (key, factor) in OTEL_GAUGES.items():
            self.gauges[name].set(values[key] * factor)
        flops = values["model_flops_per_s"] / self.processes  # megatron-core tells those of a GPU
        self.gauges[OTEL_FLOPS].set(flops / 1e12)
        self.duration.record(values["step_time_s"] * 1e3)
        self.skipped.add(values["skipped_steps"] - self.skipped_before)
        self.skipped_before = values["skipped_steps"]

    def close(self) -> None:
        """The provider belongs to the process."""


class Sinks:
    """All sinks of a run; one that fails is left out."""

    def __init__(self, sinks: list[Sink]) -> None:
        self.sinks = sinks

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Pass a step's numbers on."""
        self._each(lambda sink: sink.log(values, step))

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self.sinks):
            try:
                call(sink)
            except Exception as error:  # libraries of others raise what they like
                self.sinks.remove(sink)
                name = type(sink).__name__
                print(f"warning: {name} is left out from here on: {error}", flush=True)


def open_sinks(config: Config, processes: int) -> Sinks:
    """The sinks that the flags ask for, and OpenTelemetry's where it is installed.

    Raises ValueError for a package that is asked for and not installed.
    """
    run = config.run
    sinks: list[Sink] = []
    if run.wandb_project:
        sinks.append(WandbSink(_package("wandb", "--wandb-project"), config))
    if run.mlflow_experiment:
        sinks.append(MlflowSink(_package("mlflow", "--mlflow-experiment"), config))
    if is_installed("opentelemetry"):
        sinks.append(OtelSink(importlib.import_module("opentelemetry.metrics"), processes))
    return Sinks(sinks)


def is_installed(package: str) -> bool:
    """Whether an optional package can be imported; none is imported for that."""
    return importlib.util.find_spec(package) is not None


def _package(name: str, flag: str) -> ModuleType:
    if not is_installed(name):
        raise ValueError(f"{flag} needs a package that is not installed: pip install {name}")
    return importlib.import_module(name)


def identity(work_dir: Path) -> str:
    """A name for the run in `work_dir`, the same after every restart, kept in a file there."""
    file = work_dir / "run_id"
    if not file.is_file():
        file.write_text(uuid.uuid4().hex, encoding="utf-8")
    return file.read_text(encoding="utf-8")


def flat(config: Config) -> dict[str, Any]:
    """`section.field` -> value."""
    found: dict[str, Any] = {}

    def visit(tree: Mapping[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                visit(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = value

    visit(dataclasses.asdict(config), "")
    return found
