"""What came of the quick start: `summary.json`, a table, and `loss.png`."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

# Both need no judge model. The first has no rule for open questions, the second has.
PROTOCOLS = ("vlmevalkit", "medevalkit")

Summary = dict[str, Any]
Rows = list[dict[str, float]]

# Colours that differ in lightness too (Okabe and Ito 2008).
_COLOURS = ("#E69F00", "#009E73", "#0072B2")
_TRAINED = ("projector", "projector + ViT", "all weights")


def summarise(output: Path, phases: list[str], seconds: dict[str, float]) -> Summary:
    """Collect the results below `output` and write `summary.json`.

    Args:
        output: folder of the quick start.
        phases: names of the phases' work folders, in order.
        seconds: time each step took when it was run, which may be an earlier day.
    """
    scores = json.loads((output / "evaluation.json").read_text())
    guesses = json.loads((output / "data" / "data_set.json").read_text())["guess_accuracy"]
    result = json.loads((output / "scores" / "scores.json").read_text())
    summary = {
        "held_out_accuracy": scores["accuracy"],
        "guess_accuracy": guesses["overall"],
        "by_protocol": {name: result["protocols"][name]["all"] for name in PROTOCOLS},
        "by_question_type": scores["by_question_type"],
        "by_class": scores["by_class"],
        "guess_by_question_type": {k: v for k, v in guesses.items() if k != "overall"},
        "phases": [_phase(output / name, seconds[name]) for name in phases],
        "export": str(output / "hf"),
        "seconds": seconds,
        "seconds_total": round(sum(seconds.values()), 1),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def table(summary: Summary) -> str:
    """The summary for the terminal."""
    lines = ["", f"{'phase':<10}{'steps':>7}{'first loss':>12}{'last loss':>11}{'tokens/s':>10}"]
    lines[-1] += f"{'pack fill':>11}{'seconds':>9}"
    for phase in summary["phases"]:
        lines.append(
            f"{phase['name']:<10}{phase['steps']:>7}{phase['first_loss']:>12.4f}"
            f"{phase['last_loss']:>11.4f}{phase['tokens_per_s']:>10,.0f}"
            f"{phase['pack_fill']:>11.1%}{phase['seconds']:>9.0f}"
        )
    guesses = summary["guess_by_question_type"]
    lines += ["", *_scores("question type", summary["by_question_type"], guesses)]
    lines += ["", *_scores("class", summary["by_class"], {}), ""]
    lines.append(
        f"held-out accuracy {summary['held_out_accuracy']:.3f} "
        f"(guessing: {summary['guess_accuracy']:.3f})"
    )
    lines += [_protocol(name, score) for name, score in summary["by_protocol"].items()]
    lines.append(f"Hugging Face export: {summary['export']}")
    lines.append(f"all steps together: {summary['seconds_total'] / 60:.1f} minutes")
    return "\n".join(lines)


def draw(output: Path, summary: Summary) -> None:
    """Write `loss.png`: the phases' losses one after the other, and held-out crops with scores."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [phase["name"] for phase in summary["phases"]]
    images = _one_image_per_class(output / "data")
    figure = Figure(figsize=(12, 6.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, len(images), height_ratios=(3.4, 1))
    _draw_losses(figure.add_subplot(grid[0, :]), [_rows(output / name) for name in names])
    for column, (name, path) in enumerate(images.items()):
        _draw_crop(figure.add_subplot(grid[1, column]), path, name, summary["by_class"][name])
    figure.suptitle(
        f"GMAI-VL quick start: held-out accuracy {summary['held_out_accuracy']:.1%}, "
        f"guessing {summary['guess_accuracy']:.1%}",
        fontsize=14,
    )
    figure.savefig(output / "loss.png", metadata={"Software": None})


def copy_examples(output: Path) -> None:
    """Write `examples/`: for the chat page, a held-out picture of each class, and one of 16 bits,
    whose window the page can move."""
    folder = output / "examples"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, path in _one_image_per_class(output / "data").items():
        shutil.copyfile(path, folder / f"{name}{path.suffix}")
    deep = sorted((output / "data" / "images").glob("chest_xray_held_out_*.png"))[0]
    shutil.copyfile(deep, folder / "chest_xray_16_bits.png")


def _phase(folder: Path, seconds: float) -> dict[str, Any]:
    rows = _rows(folder)
    return {
        "name": folder.name,
        "steps": int(rows[-1]["iteration"]),
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
        "tokens_per_s": float(np.median([row["tokens_per_s"] for row in rows])),
        "pack_fill": float(np.mean([row["pack_fill"] for row in rows])),
        "seconds": seconds,
    }


def _rows(folder: Path) -> Rows:
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not rows:
        raise ValueError(f"{path} holds no steps; delete {folder} and run again")
    return rows


def _scores(title: str, scores: dict[str, float], guesses: dict[str, float]) -> list[str]:
    width = max(len(title), *map(len, scores)) + 2
    lines = [f"{title:<{width}}accuracy" + ("   guess" if guesses else "")]
    for name, score in scores.items():
        guess = f"{guesses[name]:>8.3f}" if name in guesses else ""
        lines.append(f"{name:<{width}}{score:>8.3f}{guess}")
    return lines


def _protocol(name: str, score: dict[str, Any]) -> str:
    low, high = score["interval_95"]
    return (
        f"under the rules of {name}: {score['accuracy']:.3f}, 95 % interval {low:.3f} to "
        f"{high:.3f}, {score['n']} questions"
    )


def _draw_losses(axes: Any, phases: list[Rows]) -> None:
    start = 0.0
    for number, rows in enumerate(phases):
        steps = np.array([row["iteration"] for row in rows]) + start
        losses = np.array([row["loss"] for row in rows])
        colour, end = _COLOURS[number], float(steps[-1])
        axes.axvspan(start, end, color=colour, alpha=0.07, linewidth=0)
        axes.plot(steps, losses, color=colour, alpha=0.35, linewidth=1)
        label = f"phase {number + 1}: {_TRAINED[number]} (last {losses[-1]:.3f})"
        axes.plot(steps, _smooth(losses), color=colour, linewidth=2.2, label=label)
        start = end
    axes.set(yscale="log", xlabel="optimizer step", ylabel="loss per supervised token")
    axes.set_xlim(0, start)
    axes.grid(True, which="both", alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _smooth(values: np.ndarray, decay: float = 0.6) -> np.ndarray:
    """Exponential mean of the logarithm, that starts unbiased."""
    mean, weight, smoothed = 0.0, 0.0, []
    for value in np.log(values):
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return np.exp(smoothed)


def _one_image_per_class(data: Path) -> dict[str, Path]:
    """A held-out 8-bit crop of each class with a picture of its own."""
    images: dict[str, Path] = {}
    for sample in json.loads((data / "held_out.json").read_text()):
        name = sample["image"]
        if isinstance(name, str) and name.endswith(".jpg"):
            images.setdefault(sample["class"], data / name)
    return images


def _draw_crop(axes: Any, path: Path, name: str, accuracy: float) -> None:
    from PIL import Image

    with Image.open(path) as image:
        axes.imshow(image.convert("RGB"))
    axes.set_title(f"{name.replace('_', ' ')}\n{accuracy:.0%}", fontsize=9)
    axes.axis("off")
