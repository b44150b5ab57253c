"""`make train`: data, shards, three phases, evaluation, export, a table and a picture.

    python -m examples.quickstart.run [--output runs/quickstart]

A second run reuses every step that is complete, and goes on with a phase that was interrupted. The
phases freeze what GMAI-VL's phases freeze; their lengths and learning rates differ from the
paper's, because here both towers start from random weights and phase 3 has to teach them nearly
everything.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from examples.quickstart import report
from examples.quickstart.build import build
from examples.quickstart.sources import DISTRIBUTIONS
from examples.quickstart.steps import Done, StepFailed, Steps, command

ROOT = Path(__file__).resolve().parents[2]
DATA_MODULES = ("sources.py", "crops.py", "questions.py", "samples.py", "tokenizer.py", "build.py")


@dataclass(frozen=True)
class Phase:
    """One of the three phases: its optimizer steps, peak learning rate, and what is frozen."""

    name: str
    steps: int
    learning_rate: float
    frozen: tuple[str, ...]


PHASES = (
    Phase("phase1", 20, 1e-3, ("--freeze-vit", "--freeze-llm")),
    Phase("phase2", 40, 1e-3, ("--freeze-llm",)),
    Phase("phase3", 760, 1e-3, ()),
)


@dataclass(frozen=True)
class Folders:
    """Everything the quick start makes, below one folder."""

    output: Path

    @property
    def data(self) -> Path:
        return self.output / "data"

    @property
    def shards(self) -> Path:
        return self.output / "shards"

    @property
    def export(self) -> Path:
        return self.output / "hf"

    @property
    def evaluation(self) -> Path:
        return self.output / "evaluation.json"

    @property
    def scores(self) -> Path:
        return self.output / "scores"

    @property
    def last_checkpoints(self) -> Path:
        return self.phase(PHASES[-1]) / "checkpoints"

    def phase(self, phase: Phase) -> Path:
        return self.output / phase.name


def layout(gpus: int) -> tuple[int, tuple[str, ...]]:
    """Processes, and the flags that share the model among them.

    Four processes on the CPU or on four GPUs and more: TP2 x PP2. Fewer GPUs: TP2, or one process.
    """
    tensor = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
    if gpus == 1:
        return 1, ()
    if gpus in (2, 3):
        return 2, tensor
    return 4, (*tensor, "--pipeline-model-parallel-size", "2")


def training_command(folders: Folders, index: int, gpus: int) -> list[str]:
    """The command of phase `index`; each phase but the first starts from the one before."""
    phase = PHASES[index]
    processes, parallel = layout(gpus)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += [f"--nproc-per-node={processes}", "pretrain_gmai_vl.py", "--preset", "gmai-vl-tiny"]
    words += ["--shards", str(folders.shards), "--work-dir", str(folders.phase(phase)), *parallel]
    words += ["--train-iters", str(phase.steps), "--lr", str(phase.learning_rate), *phase.frozen]
    # Four packs in a forward pass: a tiny model's time goes into calls, not into arithmetic.
    words += ["--micro-batch-size", "4", "--adam-beta2", "0.95", "--log-interval", "10"]
    words += ["--checkpoint-interval", "0.25"]
    if index > 0:
        words += ["--load", str(folders.phase(PHASES[index - 1]) / "checkpoints")]
    return words


def train(output: Path) -> None:
    """All steps. Raises StepFailed or ValueError with a message for the user."""
    folders = Folders(output.resolve())
    steps = Steps(folders.output / "steps")
    done = _trained(steps, folders, PHASES)
    previous = done[PHASES[-1].name]
    done["evaluation"] = _evaluation(steps, folders, previous)
    done["scores"] = _scores(steps, folders, previous)
    done["export"] = _export(steps, folders, previous)
    seconds = {name: step.seconds for name, step in done.items()}
    summary = report.summarise(folders.output, [phase.name for phase in PHASES], seconds)
    report.draw(folders.output, summary)
    report.copy_examples(folders.output)
    print(report.table(summary))


def first_phases(output: Path, count: int) -> dict[str, list[float]]:
    """Only the data and the first phases; name of each -> its losses. Raises as `train`."""
    folders, phases = Folders(output.resolve()), PHASES[:count]
    _trained(Steps(folders.output / "steps"), folders, phases)
    losses = {}
    for phase in phases:
        lines = (folders.phase(phase) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[phase.name] = [float(json.loads(line)["loss"]) for line in lines]
    return losses


def _trained(steps: Steps, folders: Folders, phases: Sequence[Phase]) -> dict[str, Done]:
    """Data, shards and phases, each from what is before it."""
    data, gpus = _data(steps, folders), _gpus()
    done = {"data": data, "shards": _shards(steps, folders, data)}
    previous = done["shards"]
    for index, phase in enumerate(phases):
        words = training_command(folders, index, gpus)
        made = folders.phase(phase)
        previous = _command_step(steps, phase.name, previous, words, made, going_on=("--resume",))
        done[phase.name] = previous
    return done


def _data(steps: Steps, folders: Folders) -> Done:
    here = Path(__file__).parent
    inputs = [(here / name).read_text() for name in DATA_MODULES]
    inputs += [
        f"{name} {version(name)}"
        for name in (*DISTRIBUTIONS.values(), "pydicom", "pillow", "numpy")
    ]

    def action() -> None:
        made = build(folders.data)
        print(
            f"{made.list_file}; guessing scores {made.guess_accuracy:.3f} on {made.held_out}",
            flush=True,
        )

    return steps.run("data", inputs, [folders.data], action)


def _shards(steps: Steps, folders: Folders, data: Done) -> Done:
    words = [sys.executable, "tools/make_shards.py"]
    words += ["--datasets", str(folders.data / "quickstart.json")]
    words += ["--tokenizer", str(folders.data / "tokenizer.model")]
    words += ["--output", str(folders.shards)]
    return _command_step(steps, "shards", data, words, folders.shards, going_on=())


def _evaluation(steps: Steps, folders: Folders, trained: Done) -> Done:
    words = [sys.executable, "tools/evaluate.py", "--load", str(folders.last_checkpoints)]
    words += ["--data", str(folders.data / "held_out.json"), "--output", str(folders.evaluation)]
    return _command_step(steps, "evaluation", trained, words, folders.evaluation)


def _scores(steps: Steps, folders: Folders, trained: Done) -> Done:
    """The same questions as published benchmarks are asked and scored: docs/evaluation.md."""
    table = folders.scores / "QuickStart.tsv"
    made = folders.scores / "predictions"
    predictions = made / "gmai-vl-tiny_QuickStart.tsv"
    words = [sys.executable, "tools/make_benchmark.py", "records", "--name", table.stem]
    words += ["--source", str(folders.data), "--output", str(folders.scores)]
    benchmark = _command_step(steps, "benchmark", trained, words, table)
    words = [sys.executable, "tools/evaluate.py", "predict", "--load"]
    words += [str(folders.last_checkpoints), "--benchmark", str(table), "--prompt", "plain"]
    words += ["--output", str(predictions)]
    predicted = _command_step(steps, "predictions", benchmark, words, made, going_on=())
    words = [sys.executable, "tools/evaluate.py", "score", "--benchmark", str(table)]
    words += ["--predictions", str(predictions), "--html", str(folders.scores / "cases.html")]
    words += [word for name in report.PROTOCOLS for word in ("--protocol", name)]
    result = folders.scores / "scores.json"
    return _command_step(steps, "scores", predicted, [*words, "--output", str(result)], result)


def _export(steps: Steps, folders: Folders, trained: Done) -> Done:
    words = [sys.executable, "tools/convert_checkpoint.py", "to-hf"]
    words += ["--load", str(folders.last_checkpoints), "--output", str(folders.export)]
    return _command_step(steps, "export", trained, words, folders.export)


def _command_step(
    steps: Steps,
    name: str,
    before: Done,
    words: list[str],
    made: Path,
    going_on: tuple[str, ...] | None = None,
) -> Done:
    """A step that is a command. With the flags `going_on`, which may be none, it continues what it
    had made when it was interrupted."""

    def action() -> None:
        command([*words, *(going_on or ())] if made.exists() else words, ROOT)

    try:
        inputs = [before.fingerprint, *words]
        return steps.run(name, inputs, [made], action, continues=going_on is not None)
    except StepFailed as error:
        raise StepFailed(f"{name} failed: {error}") from error


def _gpus() -> int:
    import torch  # heavy: only when something is to be run

    return torch.cuda.device_count()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "quickstart")
    try:
        train(parser.parse_args().output)
    except (StepFailed, ValueError) as error:
        print(f"quick start: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quick start: stopped; the same command goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
