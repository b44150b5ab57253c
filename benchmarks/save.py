"""Saving at once against saving from a copy, side by side in one run -> runs/bench/save.json.

    python benchmarks/save.py [--hidden 768] [--rounds 6]

One CPU process with a model of some 60 million parameters takes steps and saves after each, in
turn at once and asynchronously. What counts is how long training waits. The host memory of an
asynchronous save is the growth of the process beside its state, over its share of the checkpoint.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path

import psutil
from kernel_figures import Figure, at_most, show, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.drill.data import MAX_LENGTH, make_shards
from megatron_gmai.cli import parse
from megatron_gmai.config import Config
from megatron_gmai.runtime.quiet import quiet_libraries

STALL, MEMORY = 0.10, 1.2


def main() -> int:
    """Returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/save.json"))
    flags = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder) / "data", 200, seed=0)
        figures = measure(config_of(shards, Path(folder), flags.hidden), flags.rounds)
    show(figures)
    write(flags.output, figures, ["one CPU process; the files lie on the disk of TMPDIR"])
    return int(any(figure.holds is False for figure in figures))


def config_of(shards: Path, folder: Path, hidden: int) -> Config:
    """The tiny model with a wider language model."""
    argv = ["--preset", "gmai-vl-tiny", "--shards", str(shards), "--work-dir", str(folder / "run")]
    argv += ["--max-length", str(MAX_LENGTH), "--global-batch-size", "1", "--train-iters", "1000"]
    argv += ["--tokenizer", str(shards), "--device", "cpu", "--async-save", "--keep-last", "1"]
    config, _ = parse(argv)
    language = dataclasses.replace(
        config.model.language, hidden_size=hidden, num_layers=6, ffn_hidden_size=3 * hidden
    )
    model = dataclasses.replace(config.model, language=language)
    return dataclasses.replace(config, model=model)


def measure(config: Config, rounds: int) -> list[Figure]:
    """Medians of both ways, and the memory of the second."""
    from megatron_gmai.runtime.world import open_world
    from megatron_gmai.training.checkpoint import pieces_to_write
    from megatron_gmai.training.saving import Saver
    from megatron_gmai.training.setup import build_run
    from megatron_gmai.training.start import Start, complete

    config = complete(config, Start())
    run = build_run(config, Start(), open_world(config))
    at_once = dataclasses.replace(config, run=dataclasses.replace(config.run, async_save=False))
    run.step(run.batches, 1e-4)  # the optimizer's state is there
    pieces = pieces_to_write([c.module for c in run.chunks], run.optimizer, config)
    share = sum(piece.tensor.nbytes for piece in pieces)
    waits: dict[str, list[float]] = {"at once": [], "from a copy": []}
    plain = Saver(dataclasses.replace(run, config=at_once))
    plain.save(1, must_succeed=False)  # what only a first save costs is no part of either
    with Peak() as peak:
        saver = Saver(run)
        first = saver.save(2, must_succeed=False)
        saver.finish()
    for number in range(rounds):
        for way, one in (("at once", plain), ("from a copy", saver)):
            run.step(run.batches, 1e-4)
            waits[way].append(one.save(2 * number + 3 + (one is saver), must_succeed=False))
            one.finish()  # as the many steps between two saves would
    sync, copied = (statistics.median(waits[way]) for way in waits)
    return [
        Figure("share of the checkpoint", share / 1e9, "GB"),
        Figure("training waits, saving at once", sync, "s"),
        Figure("training waits, saving from a copy", copied, "s"),
        Figure("the first save from a copy, right at the start", first, "s"),
        at_most("waiting for a copy / saving at once", copied / sync, "", STALL),
        at_most("host memory of a save / own share", peak.growth / share, "", MEMORY),
    ]


class Peak:
    """Watches how far the memory of this process grows inside the context."""

    def __enter__(self) -> "Peak":
        self.process, self.growth = psutil.Process(os.getpid()), 0
        self.before = self.process.memory_info().rss
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.closed.wait(0.01):
            self.growth = max(self.growth, self.process.memory_info().rss - self.before)

    def __exit__(self, *error: object) -> None:
        self.closed.set()
        self.thread.join()


if __name__ == "__main__":
    sys.exit(main())
