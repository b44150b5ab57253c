"""Token lengths: a table beside the shards, one for each way to turn samples into tokens.

Shards do not depend on the tokenizer; the table does, and carries a fingerprint of the shards, the
tokenizer, the template, the tokens of an image and the length limit in its name. Until all shards
are measured, each has a part of its own: building leaves them, and an interrupted run keeps them.
"""

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.ledger import BadSample, Rejection, dump_line, read_ledger
from megatron_gmai.data.lock import building
from megatron_gmai.data.plan.windows import LENGTH_ROW
from megatron_gmai.data.pool import Report, WorkerDied, run_jobs
from megatron_gmai.data.progress import Progress
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.text.encoder import Encoder

# Half of LENGTH_ROW's memory, for tables whose numbers all fit.
SHORT_ROW = np.dtype([("length", "<u2"), ("images_end", "<u2")])


class LengthParts:
    """The parts of one table in a folder, and the part that is being measured."""

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self.folder = folder / f".lengths-{encoder.fingerprint}"
        self._encoder = encoder
        self._rows: list[tuple[int, int]] = []
        self._rejections: list[Rejection] = []

    def measure(
        self, record: Mapping[str, Any], images: int, key: str, sample_id: str, source: str
    ) -> None:
        """Adds a row for the next sample of the shard; one that cannot be used has length 0."""
        try:
            rendered = self._encoder.encode(record, images)
            self._rows.append((len(rendered.tokens), rendered.images_end))
        except BadSample as error:
            self.reject(Rejection(key, source, str(error), id=sample_id, image=error.image))

    def reject(self, rejection: Rejection) -> None:
        self._rows.append((0, 0))
        self._rejections.append(rejection)

    def save(self, shard: str, index_rows: np.ndarray) -> None:
        """Writes the part; the rows come last and mean: complete."""
        rows, ledger = self._files(shard, index_rows)
        rows.parent.mkdir(exist_ok=True)
        write_atomically(ledger, "".join(map(dump_line, self._rejections)).encode())
        write_atomically(rows, np.array(self._rows, dtype=LENGTH_ROW).tobytes())
        self._rows, self._rejections = [], []

    def load(self, shard: str, index_rows: np.ndarray) -> tuple[np.ndarray, list[Rejection]] | None:
        """The part of this shard with this content, if it is there."""
        rows, ledger = self._files(shard, index_rows)
        if not rows.exists():
            return None
        table = np.fromfile(rows, dtype=LENGTH_ROW)
        return (table, read_ledger(ledger)) if len(table) == len(index_rows) else None

    def _files(self, shard: str, index_rows: np.ndarray) -> tuple[Path, Path]:
        content = zlib.crc32(index_rows["crc"].tobytes(), len(index_rows))
        name = f"{shard}-{content:08x}"
        return self.folder / f"{name}.rows", self.folder / f"{name}.{'rejected.jsonl'}"


def token_lengths(
    shards: Shards, encoder: Encoder, workers: int = 0, log: Callable[[str], None] = lambda s: None
) -> tuple[np.ndarray, list[Rejection]]:
    """The table, SHORT_ROW or LENGTH_ROW [samples], mapped from its file, and the samples it
    rejects.

    Computes and writes both on first use, with `workers` processes (0: this one).
    """
    table = shards.folder / f"lengths-{_fingerprint(shards, encoder)}.npy"
    ledger = table.with_suffix(".rejected.jsonl")
    if not table.exists():
        try:
            with building(shards.folder, log) as holder:
                if not table.exists():  # another may have measured while this one waited
                    parts = LengthParts(shards.folder, encoder)
                    _measure(shards, encoder, parts, workers, Progress(log, holder.tell))
                    _join(shards, parts, table, ledger)
        except OSError as error:
            raise ValueError(f"cannot write token lengths to {table}: {error.strerror}") from error
    return _load(table, len(shards), encoder), read_ledger(ledger)


def _load(table: Path, samples: int, encoder: Encoder) -> np.ndarray:
    """The table, mapped. Raises ValueError for one that nobody can have measured: packs would be
    made of it all the same, and would never end."""
    wrong = f"{table} does not belong to these shards; delete it"
    try:
        if not table.is_file():  # a pipe would wait for ever
            raise ValueError(wrong)
        rows = np.load(table, mmap_mode="r")
    except Exception as error:  # numpy raises anything on damaged headers
        raise ValueError(wrong) from error
    if rows.dtype not in (SHORT_ROW, LENGTH_ROW) or rows.shape != (samples,):
        raise ValueError(wrong)
    most = {name: int(rows[name].max(initial=0)) for name in ("length", "images_end")}
    least = min(int(rows[name].min(initial=0)) for name in most)
    cut = most["images_end" if encoder.cut else "length"]
    if least < 0 or cut > encoder.max_length or (rows["images_end"] > rows["length"]).any():
        raise ValueError(wrong)
    return rows


def _fingerprint(shards: Shards, encoder: Encoder) -> str:
    parts = f"{encoder.fingerprint} {shards.manifest.inputs}"
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _measure(
    shards: Shards, encoder: Encoder, parts: LengthParts, workers: int, progress: Progress
) -> None:
    """Leaves a part for every shard."""
    jobs = [
        shard
        for shard, file in enumerate(shards.manifest.shards)
        if parts.load(file.name, shards.rows_of(shard)) is None
    ]
    progress.begin("measuring token lengths", sum(len(shards.rows_of(job)) for job in jobs))
    work = partial(_measure_shard, shards, encoder)
    try:
        for _ in run_jobs(work, jobs, workers if len(jobs) > 1 else 0, progress):
            pass
    except WorkerDied as error:
        row = int(shards.first_rows[error.job]) + error.item
        raise ValueError(f"{error} at {shards.location(min(row, len(shards) - 1))}") from error


def _measure_shard(shards: Shards, encoder: Encoder, shard: int, report: Report) -> None:
    parts = LengthParts(shards.folder, encoder)
    first, last = (int(row) for row in shards.first_rows[shard : shard + 2])
    for sample in range(first, last):
        report(sample - first, 0)
        key, source = shards.location(sample), shards.source_name(sample)
        try:
            own_key, record = shards.read_record(sample)
        except BadSample as error:
            parts.reject(Rejection(key, source, str(error)))
        else:
            parts.measure(record, int(shards.rows[sample]["images"]), key, own_key, source)
    report(last - first, 0)
    parts.save(shards.manifest.shards[shard].name, shards.rows_of(shard))


def _join(shards: Shards, parts: LengthParts, table: Path, ledger: Path) -> None:
    tables, rejections = [np.empty(0, dtype=LENGTH_ROW)], list[Rejection]()
    for shard, file in enumerate(shards.manifest.shards):
        part = parts.load(file.name, shards.rows_of(shard))
        assert part is not None
        tables.append(part[0])
        rejections += part[1]
    write_atomically(ledger, "".join(map(dump_line, rejections)).encode())
    _save(table, _shortened(np.concatenate(tables)))
    shutil.rmtree(parts.folder, ignore_errors=True)


def _shortened(rows: np.ndarray) -> np.ndarray:
    most = max(int(rows[name].max(initial=0)) for name in ("length", "images_end"))
    return rows.astype(SHORT_ROW) if most < 2**16 else rows


def _save(path: Path, rows: np.ndarray) -> None:
    partial_file = path.with_name(f"{path.stem}.{os.getpid()}.partial.npy")
    np.save(partial_file, rows)
    partial_file.replace(path)
