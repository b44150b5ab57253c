"""Disks, checkpoints and shards: room, speed, and whether every process sees the same."""

import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_gmai.config import Config
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.sources.remote import is_url
from megatron_gmai.planner.memory import is_trained
from megatron_gmai.preflight.check import FAIL, PASS, WARN, Check
from megatron_gmai.weights import is_stored, weights

WRITTEN = 64 * 2**20  # bytes of the speed test
SLOW_SAVE = 600.0  # seconds of a checkpoint from which it costs more than the interval is worth
KEPT = 3  # checkpoints that should have room
SAMPLES = 64  # read and checked by each rank
OPTIMIZER_BYTES = 12  # a trained parameter's fp32 master and Adam's two moments
TOKEN_FILE = ".preflight-token"
DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def checkpoint_bytes(config: Config, dtype: str) -> int:
    """Size of one checkpoint: its weights, and the optimizer's state of the trained ones."""
    table = weights(config.model, config.lora).values()
    stored = sum(math.prod(w.shape) for w in table if is_stored(w, config.lora))
    trained = sum(math.prod(w.shape) for w in table if is_trained(config, w))
    state = 0 if config.run.checkpoint_drop_optimizer else OPTIMIZER_BYTES * trained
    return WEIGHT_BYTES[dtype] * stored + state


def checkpoints_kept(config: Config) -> int:
    """So many checkpoints of this run lie on the disk at once, the one that is written included;
    of a run whose length is not known yet, or that saves at its end only, a few."""
    run, steps = config.run, config.train.train_iters
    interval = run.checkpoint_interval
    if steps is None or interval < 0:
        return KEPT if run.keep_last is None else run.keep_last + 1
    saves = math.ceil(1 / interval if interval < 1 else steps / interval)
    if run.keep_last is None:
        return saves
    every = 0 if run.keep_every is None else steps // run.keep_every
    return min(saves, run.keep_last + 1 + every)


def room(folder: Path, size: int, count: int = KEPT) -> Iterator[Check]:
    """Free space beside what `count` checkpoints of `size` bytes take."""
    free = shutil.disk_usage(_existing(folder)).free
    detail = f"{_size_text(free)} free, a checkpoint has {_size_text(size)}"
    if free < size:
        yield Check(
            "room for checkpoints", FAIL, detail, f"free space, or set --save (now {folder})"
        )
    else:
        status = PASS if free >= count * size else WARN
        remedy = f"{count} of this run do not fit: free space, or lower --keep-last"
        yield Check("room for checkpoints", status, detail, remedy)


def write_speed(folder: Path, size: int, rank: int) -> Iterator[Check]:
    """Writes and removes a file, as one rank alone does; the disk's cache is not believed."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".preflight-{os.getpid()}-{rank}"
    block = np.random.default_rng(rank).bytes(2**20)  # that no file system compresses
    began = time.monotonic()
    try:
        with file.open("wb") as out:
            for _ in range(WRITTEN // len(block)):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        speed = WRITTEN / (time.monotonic() - began)
    finally:
        file.unlink(missing_ok=True)
    seconds = size / speed
    detail = f"{speed / 1e6:,.0f} MB/s by one process, a checkpoint takes {seconds:,.0f} s"
    remedy = "use a faster disk for --save, or save less often (--checkpoint-interval)"
    yield Check("speed of checkpoints", PASS if seconds < SLOW_SAVE else WARN, detail, remedy)


def put_token(folder: Path, token: str) -> Iterator[Check]:
    """Leaves what every process must see; the first rank calls it before the others look."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKEN_FILE).write_text(token, encoding="utf-8")
    yield from ()


def same_folder(folder: Path, token: str, host: str) -> Iterator[Check]:
    """Whether this process sees the folder that the first rank sees."""
    file = folder / TOKEN_FILE
    seen = file.is_file() and file.read_text(encoding="utf-8") == token
    detail = f"{folder} is the same for all" if seen else f"{host} sees another {folder}"
    yield Check("shared folder", PASS if seen else FAIL, detail, "put --work-dir on shared storage")


def shards(folder: str | None, rank: int, world: int) -> Iterator[Check]:
    """Every shard has its size, and samples spread over all of them their checksums."""
    if folder is None:
        yield Check("shards", WARN, "none yet: made from --datasets when the run starts",
                    "make them before the job: tools/make_shards.py")  # fmt: skip
        return
    found = Shards(folder)
    if not len(found):
        yield Check("shards", FAIL, f"no sample in {folder}", "see rejected.jsonl in it")
        return
    if unreachable := list(shard_files(folder, rank, world)):
        yield from unreachable
        return
    chosen = np.unique(np.linspace(rank % len(found), len(found) - 1, SAMPLES, dtype=np.int64))
    began, read, damaged = time.monotonic(), 0, list[str]()
    for sample in chosen:
        try:
            read += sum(map(len, found.read(int(sample)).images))
        except BadSample:
            damaged.append(found.location(int(sample)))
    speed = read / (time.monotonic() - began) / 1e6
    detail = (
        f"{len(found)} samples in {len(found.manifest.shards)} shard(s), read at {speed:,.0f} MB/s"
    )
    if damaged:
        detail = f"{len(damaged)} of {len(chosen)} samples are damaged: {damaged[0]}"
    remedy = "copy the shard again; damaged samples are rejected and counted as a run meets them"
    yield Check("shards", FAIL if damaged else PASS, detail, remedy)


def shard_files(folder: str, rank: int = 0, world: int = 1) -> Iterator[Check]:
    """A row only if one of this rank's files is not there whole; nothing of them is read."""
    missing = [
        file.name
        for file in Shards(folder).manifest.shards[rank::world]
        if not is_url(folder) and _size(Path(folder) / file.name) not in (file.size, None)
    ]
    if missing:
        detail = f"{missing[0]} is absent or of another size ({len(missing)} such)"
        yield Check("shards", FAIL, detail, "copy them again, or make them again")


def _size(path: Path) -> int | None:
    """None behind an index whose tar files lie elsewhere."""
    if path.is_file():
        return path.stat().st_size
    return None if (path.parent / "origin").is_file() else -1


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def _size_text(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**29 else f"{size / 2**20:,.1f} MiB"
