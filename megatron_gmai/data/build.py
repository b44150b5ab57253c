"""Makes shards from the data sets of a list file: every record checked, every image decoded once.

Work is cut into units, one tar file each, which depend on nothing but their records; a unit that
is complete is not made again after a crash.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gmai.data import image as images
from megatron_gmai.data.conversation import image_names, parse_conversation
from megatron_gmai.data.ledger import BadSample, Rejection, dump_line, read_ledger
from megatron_gmai.data.mixture import Source, read_list
from megatron_gmai.data.order import permutation
from megatron_gmai.data.records import read_records
from megatron_gmai.data.shards import (
    INDEX_FILE,
    MANIFEST_FILE,
    REJECTED_FILE,
    ROW,
    Manifest,
    ShardFile,
    ShardWriter,
    SourceInfo,
    read_manifest,
    write_atomically,
    write_manifest,
)

RECORDS_PER_SHARD = 1000
PARTS = ".parts"
MAX_IMAGE_BYTES = 500_000_000
SUFFIXES = {"jpeg": "jpg", "jpg": "jpg", "png": "png", "tif": "tif", "tiff": "tif", "webp": "webp"}


@dataclass(frozen=True)
class Unit:
    """Records that go into one tar file: (record number, record)."""

    source: Source
    source_number: int
    shard: str
    records: Sequence[tuple[int, Any]]


def build_shards(
    list_file: str | os.PathLike[str],
    output: str | os.PathLike[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Makes shards in `output`, or returns at once if the same inputs already made them.

    `progress(done, total)` counts records. Raises ValueError for a list that cannot be used,
    and for a folder that holds shards of other inputs.
    """
    sources = read_list(list_file)
    output = Path(output)
    inputs = fingerprint(sources)
    if (output / MANIFEST_FILE).exists():
        return _check_existing(output, inputs)
    _prepare_parts(output, inputs)
    units = [unit for number, source in enumerate(sources) for unit in _units(source, number)]
    total = sum(len(unit.records) for unit in units)
    done = 0
    for unit in units:
        if not _part(output, unit.shard, "npy").exists():
            write_unit(output, unit)
        done += len(unit.records)
        progress(done, total)
    return _finish(output, sources, units, inputs)


def fingerprint(sources: Sequence[Source]) -> str:
    """Of what decides the contents of the shards: names, annotation files, image folders.

    Ratios are not part of it: they are applied when the data are read.
    """
    entries = [
        [
            source.name,
            [
                (str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns)
                for f in source.annotation_files
            ],
            [str(root.resolve()) for root in source.image_roots],
        ]
        for source in sources
    ]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def _check_existing(output: Path, inputs: str) -> Manifest:
    manifest = read_manifest(output)
    if manifest.inputs != inputs:
        raise ValueError(
            f"the shards in {output} were made from other data sets, or these have changed since; "
            "delete the folder or choose another"
        )
    return manifest


def _prepare_parts(output: Path, inputs: str) -> None:
    """Keeps the complete units of an interrupted run with the same inputs; drops any other."""
    parts = output / PARTS
    marker = parts / "inputs"
    if marker.exists() and marker.read_text() == inputs:
        return
    if parts.exists():
        shutil.rmtree(parts)
    parts.mkdir(parents=True)
    marker.write_text(inputs)


def _part(output: Path, shard: str, suffix: str) -> Path:
    return output / PARTS / f"{shard}.{suffix}"


def _units(source: Source, number: int) -> list[Unit]:
    """Cuts a data set into shards. Records are shuffled once, so that each shard is a fair sample
    of its data set and a window of few shards is not biased."""
    records = [record for file in source.annotation_files for record in read_records(file)]
    order = permutation(len(records), 0, number)
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", source.name)
    units = []
    for start in range(0, len(records), RECORDS_PER_SHARD):
        chosen = [(int(i), records[i]) for i in order[start : start + RECORDS_PER_SHARD]]
        name = f"{number:03d}-{slug}-{start // RECORDS_PER_SHARD:05d}.tar"
        units.append(Unit(source, number, name, chosen))
    return units


def write_unit(output: Path, unit: Unit) -> None:
    """Writes one tar file, its rows and its rejections; the rows come last and mean: complete."""
    writer = ShardWriter(output / unit.shard)
    rejections = []
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", unit.source.name)
    for number, record in unit.records:
        key = f"{slug}/{number:08d}"
        try:
            writer.add(key, *check_record(record, unit.source))
        except BadSample as error:
            rejections.append(Rejection(key, unit.source.name, str(error)))
    rows = writer.close()
    rows["source"] = unit.source_number
    lines = "".join(dump_line(rejection) for rejection in rejections)
    write_atomically(_part(output, unit.shard, REJECTED_FILE), lines.encode())
    write_atomically(_part(output, unit.shard, "npy"), rows.tobytes())


def check_record(record: Any, source: Source) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """The record and its image files (suffix, bytes), all found usable. Raises BadSample."""
    if isinstance(record, ValueError):
        raise BadSample(str(record))
    names = image_names(record) if isinstance(record, dict) else []
    parse_conversation(record, len(names))
    files = [(_suffix(name), _read_image(name, source)) for name in names]
    return record, files


def _suffix(name: str) -> str:
    return SUFFIXES.get(name.rpartition(".")[2].lower(), "img")


def _read_image(name: str, source: Source) -> bytes:
    path = find_image(name, source.image_roots)
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise BadSample(f"image {name}: larger than {MAX_IMAGE_BYTES} bytes")
        data = path.read_bytes()
        images.decode(data)
    except OSError as error:
        raise BadSample(f"image {name}: {error.strerror}") from error
    except BadSample as error:
        raise BadSample(f"image {name}: {error}") from error
    return data


def find_image(name: str, roots: Sequence[Path]) -> Path:
    """The image file below one of `roots`. Raises BadSample if there is none, or if the name
    leads out of its root by `..`, an absolute path or a link."""
    if "\0" in name:
        raise BadSample("the image name holds a null character")
    for root in roots:
        base = root.resolve()
        path = (base / name).resolve()
        if path.is_file():
            if not path.is_relative_to(base):
                raise BadSample(f"image {name}: outside of its folder {root}")
            return path
    raise BadSample(f"image {name}: no such file in {' or '.join(str(r) for r in roots)}")


def _finish(
    output: Path, sources: Sequence[Source], units: Sequence[Unit], inputs: str
) -> Manifest:
    """Joins the units' rows into the index. Shards without a usable sample are left out."""
    shards: list[ShardFile] = []
    rows = [np.empty(0, dtype=ROW)]
    rejections = []
    for unit in units:
        part = np.fromfile(_part(output, unit.shard, "npy"), dtype=ROW)
        rejections += read_ledger(_part(output, unit.shard, REJECTED_FILE))
        if not len(part):
            (output / unit.shard).unlink()
            continue
        part["shard"] = len(shards)
        size = (output / unit.shard).stat().st_size
        shards.append(ShardFile(unit.shard, len(part), size))
        rows.append(part)
    write_atomically(
        output / REJECTED_FILE, "".join(dump_line(line) for line in rejections).encode()
    )
    index = np.concatenate(rows)
    partial = output / "index.partial.npy"
    np.save(partial, index)
    partial.replace(output / INDEX_FILE)
    counts = np.bincount(index["source"], minlength=len(sources))
    rejected = [sum(line.source == source.name for line in rejections) for source in sources]
    infos = tuple(
        SourceInfo(source.name, source.sample_ratio, source.data_augment, int(n), bad)
        for source, n, bad in zip(sources, counts, rejected, strict=True)
    )
    manifest = Manifest(tuple(shards), infos, inputs)
    write_manifest(output, manifest)
    shutil.rmtree(output / PARTS)
    return manifest
