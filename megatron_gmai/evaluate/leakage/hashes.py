"""Two hashes of an image: of its pixels, and of what it looks like (extra `leakage`).

The exact one is taken of decoded pixels, because shards hold files without their metadata. The
perceptual one is imagehash's `phash` of 256 bits: of like images few bits differ after compression,
scaling or a change of brightness, but about half after a turn or a reflection.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.shards.reader import Shards

SIDE = 16  # of the grid of bits
WORDS = SIDE * SIDE // 64
UNREADABLE = np.iinfo(np.uint16).max  # as an image number: the sample, or one of its images
HASHED = np.dtype(
    [("row", "<u4"), ("image", "<u2"), ("exact", "<u8", (2,)), ("looks", "<u8", (WORDS,))]
)
_ROWS_A_TASK = 256


def hash_image(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [2] of the pixels and uint64 [WORDS] of the looks. Raises BadSample."""
    import imagehash

    pixels = decode(data)
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(pixels.tobytes())
    exact = np.frombuffer(digest.digest()[:16], dtype="<u8")
    bits = imagehash.phash(Image.fromarray(pixels), hash_size=SIDE).hash
    return exact, np.packbits(bits.ravel()).view("<u8")


def check_installed() -> None:
    """Raises ValueError without imagehash."""
    try:
        import imagehash  # noqa: F401  (only whether it is there)
    except ImportError as error:
        raise ValueError("leakage needs imagehash: pip install 'megatron-gmai[leakage]'") from error


def hashes_of_shards(
    folder: Path, cache: Path | None, progress: Callable[[int, int], None], workers: int = 0
) -> np.ndarray:
    """HASHED, one a stored image, mapped from a file that is made on first use.

    Args:
        folder: of the shards.
        cache: where that file goes; default: the folder itself.
        progress: called with the samples done and their number.
        workers: processes; 0 for one a core.
    """
    shards = Shards(folder)
    path = (cache or folder) / f"image-hashes-{_fingerprint(shards)}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, _parts(shards, workers, progress))
    hashes = np.load(path, mmap_mode="r")
    if hashes.dtype != HASHED:
        raise ValueError(f"{path} is not of this program; delete it")
    return hashes


def _fingerprint(shards: Shards) -> str:
    content = [shards.manifest.inputs, [asdict(shard) for shard in shards.manifest.shards], SIDE]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _parts(
    shards: Shards, workers: int, progress: Callable[[int, int], None]
) -> Iterator[np.ndarray]:
    tasks = [(shards.folder, start) for start in range(0, len(shards), _ROWS_A_TASK)]
    if len(tasks) < 2:  # not worth a process
        yield from map(_hash_rows, tasks)
        return
    context = multiprocessing.get_context("spawn")  # threads of this process must not be forked
    with context.Pool(workers or os.cpu_count() or 1) as pool:
        for number, part in enumerate(pool.imap(_hash_rows, tasks)):
            yield part
            progress(min((number + 1) * _ROWS_A_TASK, len(shards)), len(shards))


def _hash_rows(task: tuple[Path, int]) -> np.ndarray:
    folder, start = task
    shards = Shards(folder)
    hashed = []
    for row in range(start, min(start + _ROWS_A_TASK, len(shards))):
        try:
            images = shards.read(row).images
        except BadSample:
            hashed.append((row, UNREADABLE, (0, 0), (0,) * WORDS))
            continue
        hashed += [_hash_one(row, number, data) for number, data in enumerate(images)]
    return np.array(hashed, dtype=HASHED)


def _hash_one(row: int, number: int, data: bytes) -> tuple[Any, ...]:
    try:
        return (row, number, *(tuple(h) for h in hash_image(data)))
    except BadSample:
        return (row, UNREADABLE, (0, 0), (0,) * WORDS)


def _write(path: Path, parts: Iterator[np.ndarray]) -> None:
    """Appends parts as they come, then copies them into a file with a header."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    raw = partial.with_suffix(".raw")
    with raw.open("wb") as file:
        for part in parts:
            file.write(part.tobytes())
    stored = np.memmap(raw, dtype=HASHED, mode="r") if raw.stat().st_size else np.empty(0, HASHED)
    with partial.open("wb") as file:
        np.save(file, stored)
    raw.unlink()
    partial.replace(path)
