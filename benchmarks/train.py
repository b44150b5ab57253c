"""Training steps against transformers, layouts against one process, attention against its length.

    python benchmarks/train.py [--rounds 8] [--output runs/bench/train.json]

Contenders take turns and ratios are medians over the turns. Bars are on time of the clock; times of
the CPU (all threads, waiting ones asleep) stand beside them, for a machine with other work.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from kernel_figures import Figure, at_least, at_most, show, write
from train_rivals import (
    BATCH,
    LENGTH,
    MODEL,
    Sample,
    make_pack,
    ours,
    peak_flops,
    save_start,
    theirs,
)

from megatron_gmai.config import IGNORE_INDEX, ParallelConfig
from megatron_gmai.runtime.processes import free_port
from megatron_gmai.runtime.quiet import quiet_libraries

CONTENDERS = {
    "here": ours,
    "padded": partial(theirs, packed=False),
    "masked packs": partial(theirs, packed=True),
}
BARS = {"padded": 1.95, "masked packs": 1.25}
SPREAD = ParallelConfig(
    tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True
)
PACKS = 4  # of a step of the layouts
SEGMENT = 128


class Worker:
    """A process with a contender in it."""

    def __init__(self, target: Any, *arguments: Any) -> None:
        self.pipe, end = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=target, args=(end, *arguments), daemon=True)
        self.process.start()

    def ask(self, question: Any) -> Any:
        self.pipe.send(question)
        return self.pipe.recv()


def contender(pipe: Connection, name: str, weights: Path) -> None:
    """Answer each seed of a pack with (loss, seconds, CPU seconds) of a step on it."""
    quiet_libraries()
    prepare = CONTENDERS[name](weights)
    while True:
        step = prepare(make_pack(pipe.recv()))
        pipe.send(timed(step))


def timed(step: Any) -> tuple[float, float, float]:
    wall, busy = time.perf_counter(), time.process_time()
    loss = step()
    return loss, time.perf_counter() - wall, time.process_time() - busy


def against_transformers(weights: Path, rounds: int) -> list[Figure]:
    """Steps on the same packs in turns; the losses must be equal from the first to the last."""
    workers = {name: Worker(contender, name, weights) for name in CONTENDERS}
    walls: dict[str, list[float]] = {name: [] for name in workers}
    busies: dict[str, list[float]] = {name: [] for name in workers}
    shares: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(rounds + 2):
        samples = make_pack(turn)
        losses = {}
        for name, worker in workers.items():
            losses[name], wall, busy = worker.ask(turn)
            if turn < 2:  # buffers are made, caches filled
                continue
            walls[name].append(wall)
            busies[name].append(busy)
            shares[name].append(flops(name, samples) / busy / peak_flops()[1])
        print(f"pack {turn}: " + ", ".join(f"{n} {x:.5f}" for n, x in losses.items()), flush=True)
        spread = max(losses.values()) / min(losses.values()) - 1
        assert spread < 1e-4, f"step {turn}: losses differ: {losses}"
    found = []
    for name, bar in BARS.items():
        label = f"one process / {name}, useful tokens"
        found.append(at_least(f"{label} a second", paired(walls, name), "x", bar))
        found.append(Figure(f"{label} a CPU second", paired(busies, name), "x"))
    useful = sum(len(s.tokens) for turn in range(2, rounds + 2) for s in make_pack(turn))
    for name in workers:
        found.append(Figure(f"{name}: useful tokens", useful / sum(walls[name]), "1/s"))
        share = 100 * median(shares[name])
        found.append(Figure(f"{name}: share of the matrix product's peak", share, "%"))
    for worker in workers.values():
        worker.process.kill()
    return found


def paired(times: dict[str, list[float]], name: str) -> float:
    return median(b / a for a, b in zip(times["here"], times[name], strict=True))


def flops(name: str, samples: list[Sample]) -> float:
    """Products with weights in a step, forward and backward, over the positions that are there."""
    language, vision = MODEL.language, MODEL.vision
    heads = 2 + 2 * language.num_query_groups / language.num_attention_heads
    layer = language.hidden_size**2 * heads + 3 * language.hidden_size * language.ffn_hidden_size
    table = language.hidden_size * language.vocab_size
    sizes = [len(sample.tokens) for sample in samples]
    positions = sum(sizes)
    if name == "padded":
        parts = [sizes[i : i + BATCH] for i in range(0, len(sizes), BATCH)]
        positions = sum(max(part) * len(part) for part in parts)
    labelled = positions
    if name == "here":  # positions without a label need no logits
        labelled = sum(int((sample.labels != IGNORE_INDEX).sum()) for sample in samples)
    images = sum(len(sample.pixels) for sample in samples)
    tower = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.ffn_hidden_size
    patches = images * vision.tokens_per_image * vision.layers_used
    return 6.0 * (language.num_layers * layer * positions + table * labelled + tower * patches)


def member(pipe: Connection, rank: int, size: int, port: int, weights: Path) -> None:
    """A rank of a layout: answers the seed of a pack with (loss, seconds, CPU seconds)."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    quiet_libraries()
    prepare = ours(weights, SPREAD if size > 1 else ParallelConfig(), PACKS)
    while True:
        pipe.send(timed(prepare(make_pack(pipe.recv()))))


def against_one_process(weights: Path, rounds: int) -> list[Figure]:
    """CPU seconds of all processes for the same steps."""
    worlds = {size: start_world(size, weights) for size in (1, 4)}
    ratios = []
    for turn in range(rounds + 2):
        busy = {}
        for size, ranks in worlds.items():
            for rank in ranks:
                rank.pipe.send(turn)
            answers = [rank.pipe.recv() for rank in ranks]
            busy[size] = sum(answer[2] for answer in answers)
        if turn >= 2:
            ratios.append(busy[4] / busy[1])
    for ranks in worlds.values():
        for rank in ranks:
            rank.process.kill()
    label = "TP2 x PP2 with sequence parallel / one process: CPU seconds a token"
    return [at_most(label, median(ratios), "x", 1.35)]


def start_world(size: int, weights: Path) -> list[Worker]:
    port = free_port()
    return [Worker(member, rank, size, port, weights) for rank in range(size)]


def attention(pipe: Connection) -> None:
    """Answer a length with (CPU seconds, bytes) of packed attention over segments of SEGMENT."""
    quiet_libraries()
    from megatron_gmai.model.attention import SegmentAttention, Segments

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    core = SegmentAttention.__new__(SegmentAttention)
    torch.nn.Module.__init__(core)
    core.causal = True
    while True:
        tokens = pipe.recv()
        bounds = torch.arange(0, tokens + 1, SEGMENT, dtype=torch.int32)
        segments = Segments.from_cu_seqlens(bounds, SEGMENT, torch.device("cpu"))
        q, k, v = (torch.randn(tokens, 8, 64, requires_grad=True) for _ in range(3))
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before, start = resident("VmRSS"), time.process_time()
        core.packed(q, k, v, segments).sum().backward()
        pipe.send((time.process_time() - start, resident("VmHWM") - before))


def attention_of(tokens: int) -> tuple[float, float]:
    """In a new process: memory that an earlier pack left would serve the next one unseen."""
    worker = Worker(attention)
    worker.ask(SEGMENT)  # buffers of threads and libraries
    answer: tuple[float, float] = worker.ask(tokens)
    worker.process.kill()
    return answer


def resident(key: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith(key))


def attention_growth(rounds: int) -> list[Figure]:
    """Segments of one length: their squares grow with the pack, by 4 from size to size."""
    sizes = (LENGTH, 4 * LENGTH, 16 * LENGTH)
    answers = {size: [attention_of(size) for _ in range(rounds)] for size in sizes}
    found = []
    for index, (kind, unit) in enumerate((("CPU time", "s"), ("memory", "bytes"))):
        value = {size: median(a[index] for a in answers[size]) for size in sizes}
        found += [Figure(f"packed attention, {s} tokens: {kind}", value[s], unit) for s in sizes]
        for small, large in zip(sizes, sizes[1:], strict=False):
            growth = value[large] / value[small] / (large / small)
            label = f"packed attention, {small} to {large} tokens: {kind} / sum of squares"
            found.append(at_most(label, growth, "x", 1.25))
    return found


def main() -> int:
    """Returns 1 if a bar is missed."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    flags.add_argument("--rounds", type=int, default=8)
    flags.add_argument("--output", type=Path, default=Path("runs/bench/train.json"))
    given = flags.parse_args()
    # Threads that wait asleep: the time of the CPU is then that of the work.
    os.environ.update(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="PASSIVE")
    multiprocessing.set_start_method("spawn")
    quiet_libraries()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder)
        save_start(weights)
        figures = against_transformers(weights, given.rounds)
        figures += against_one_process(weights, max(3, given.rounds // 3))
    figures += attention_growth(max(3, given.rounds // 3))
    show(figures)
    write(given.output, figures, [f"{os.cpu_count()} cores, torch {torch.__version__}"])
    return int(any(figure.holds is False for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
