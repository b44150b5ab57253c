"""Token lengths: a table beside the shards, one for each way to turn samples into tokens.

Shards do not depend on the tokenizer; the table does, and carries a fingerprint of the tokenizer,
the template, the tokens of an image and the length limit in its name.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np

from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.ledger import BadSample, Rejection, dump_line, read_ledger
from megatron_gmai.data.plan.windows import LENGTH_ROW
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.text.encoder import Encoder

SAMPLES_PER_JOB = 4096
# Half of LENGTH_ROW's memory, for tables whose numbers all fit.
SHORT_ROW = np.dtype([("length", "<u2"), ("images_end", "<u2")])


def token_lengths(
    shards: Shards,
    encoder: Encoder,
    workers: int = 0,
) -> tuple[np.ndarray, list[Rejection]]:
    """The table, SHORT_ROW or LENGTH_ROW [samples], mapped from its file, and the samples it
    rejects.

    Computes and writes both on first use, with `workers` processes (0: this one).
    """
    table = shards.folder / f"lengths-{encoder.fingerprint}.npy"
    ledger = table.with_suffix(".rejected.jsonl")
    if not table.exists():
        rows, rejections = _measure(shards, encoder, workers)
        write_atomically(ledger, "".join(map(dump_line, rejections)).encode())
        _save(table, _shortened(rows))
    rows = np.load(table, mmap_mode="r")
    if rows.dtype not in (SHORT_ROW, LENGTH_ROW) or len(rows) != len(shards):
        raise ValueError(f"{table} does not belong to these shards; delete it")
    return rows, read_ledger(ledger)


def _measure(shards: Shards, encoder: Encoder, workers: int) -> tuple[np.ndarray, list[Rejection]]:
    bounds = [*range(0, len(shards), SAMPLES_PER_JOB), len(shards)]
    jobs = (repeat(shards), repeat(encoder), bounds[:-1], bounds[1:])
    if workers and len(shards) > SAMPLES_PER_JOB:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver")) as pool:
            parts = list(pool.map(_measure_part, *jobs))
    else:
        parts = list(map(_measure_part, *jobs))
    rows = np.concatenate([np.empty(0, dtype=LENGTH_ROW), *(part[0] for part in parts)])
    return rows, [rejection for part in parts for rejection in part[1]]


def _measure_part(
    shards: Shards, encoder: Encoder, first: int, last: int
) -> tuple[np.ndarray, list[Rejection]]:
    """Samples first up to last."""
    rows = np.zeros(last - first, dtype=LENGTH_ROW)
    rejections = []
    for sample in range(first, last):
        key = shards.place(sample)
        try:
            key, record = shards.read_record(sample)
            rendered = encoder.encode(record, int(shards.rows[sample]["images"]))
            rows[sample - first] = (len(rendered.tokens), rendered.images_end)
        except BadSample as error:
            rejections.append(Rejection(key, shards.source_name(sample), str(error)))
    return rows, rejections


def _shortened(rows: np.ndarray) -> np.ndarray:
    most = max(int(rows[name].max(initial=0)) for name in ("length", "images_end"))
    return rows.astype(SHORT_ROW) if most < 2**16 else rows


def _save(path: Path, rows: np.ndarray) -> None:
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial.npy")
    try:
        np.save(partial, rows)
    except OSError as error:
        raise ValueError(f"cannot write token lengths to {path}: {error.strerror}") from error
    partial.replace(path)
