"""Makes shards from the data sets of a list file: every record checked, every image decoded once.

Work is cut into units, one tar file each, which depend on nothing but their records; a unit that
is complete is not made again after a crash.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.images import decode as images
from megatron_gmai.data.images.dicom import decode_dicom, is_dicom
from megatron_gmai.data.images.privacy import encode_png, strip_metadata
from megatron_gmai.data.images.tiff import take_pages
from megatron_gmai.data.ledger import BadSample, Rejection, dump_line, read_ledger
from megatron_gmai.data.plan.order import permutation
from megatron_gmai.data.shards.format import ShardWriter
from megatron_gmai.data.shards.index import (
    MANIFEST_FILE,
    REJECTED_FILE,
    ROW,
    Manifest,
    ShardFile,
    SourceInfo,
    read_manifest,
    save_index,
    write_manifest,
)
from megatron_gmai.data.sources import parquet, remote
from megatron_gmai.data.sources.mixture import Source, read_list
from megatron_gmai.data.sources.records import Records, read_record
from megatron_gmai.data.text.conversation import image_names, parse_conversation

RECORDS_PER_SHARD = 1000
PARTS = ".parts"
HASHED_BYTES = 256 * 2**20
MAX_IMAGE_BYTES = 500_000_000


@dataclass(frozen=True)
class Unit:
    """Records that go into one tar file."""

    source: Source
    source_number: int
    shard: str
    numbers: np.ndarray  # int64 [records], within the data set
    spans: np.ndarray  # records.SPAN [records]


def build_shards(
    list_file: str | os.PathLike[str],
    output: str | os.PathLike[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
    workers: int = 0,
    tiff_pages: str = "first",
) -> Manifest:
    """Makes shards in `output`, or returns at once if the same inputs already made them.

    `progress(done, total)` counts records; `workers` processes share the work (0: this one does
    it); `take_pages` explains `tiff_pages`. Raises ValueError for a list that cannot be used, and
    for a folder that holds shards of other inputs.
    """
    sources = [dataclasses.replace(s, tiff_pages=tiff_pages) for s in read_list(list_file)]
    output = Path(output)
    inputs = fingerprint(sources)
    if (output / MANIFEST_FILE).exists():
        return _check_existing(output, inputs)
    _prepare_parts(output, inputs)
    sources = [_at_hand(source, number, output / PARTS) for number, source in enumerate(sources)]
    units = [unit for number, source in enumerate(sources) for unit in _units(source, number)]
    total = sum(len(unit.numbers) for unit in units)
    missing = [unit for unit in units if not _part(output, unit.shard, "npy").exists()]
    done = total - sum(len(unit.numbers) for unit in missing)
    for count in _write_units(output, missing, workers):
        done += count
        progress(done, total)
    return _finish(output, sources, units, inputs)


def _write_units(output: Path, units: Sequence[Unit], workers: int) -> Iterator[int]:
    """Yields the number of records of each unit as it is completed."""
    if workers == 0:
        for unit in units:
            yield write_unit(output, unit)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = [pool.submit(write_unit, output, unit) for unit in units]
        try:
            for job in as_completed(jobs):
                yield job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def fingerprint(sources: Sequence[Source]) -> str:
    """Of what decides the contents of the shards: names, annotations, image folders, pages.

    Ratios are not part of it: they are applied when the data are read.
    """
    entries = [
        [
            source.name,
            [_file_fingerprint(file) for file in source.annotation_files],
            [str(root.resolve()) if root != Path() else "." for root in source.image_roots],
            *([remote.version(url) for url in source.annotation_urls], source.image_url),
            *([source.tiff_pages] if source.tiff_pages != "first" else []),
        ]
        for source in sources
    ]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def _file_fingerprint(file: Path) -> str:
    """By content, so that a copy counts as the same; by size and time where that takes long."""
    status = file.stat()
    if status.st_size > HASHED_BYTES:
        return f"{file.name} {status.st_size} {status.st_mtime_ns}"
    return f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}"


def _check_existing(output: Path, inputs: str) -> Manifest:
    manifest = read_manifest(output)
    if manifest.inputs != inputs:
        raise ValueError(
            f"the shards in {output} were made from other data sets, or these have changed since, "
            "or with another --tiff-pages; delete the folder or choose another"
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


def _at_hand(source: Source, number: int, folder: Path) -> Source:
    """The data set with annotations that can be read at random: URLs copied, Parquet unpacked. What
    an interrupted run has copied whole is kept."""
    files: list[Path] = []
    images = folder / f"{number:03d}.images"
    places: list[Path | str] = [*source.annotation_files, *source.annotation_urls]
    for place in places:
        if isinstance(place, Path) and place.suffix.lower() != parquet.SUFFIX:
            files.append(place)
            continue
        local = folder / f"{number:03d}-{len(files):05d}.annotations"
        files.append(local)
        if not local.exists():
            _copy_annotations(place, local, images)
    embedded = images if images.exists() else None
    return dataclasses.replace(
        source, annotation_files=tuple(files), annotation_urls=(), embedded_images=embedded
    )


def _copy_annotations(place: Path | str, local: Path, images: Path) -> None:
    partial, fetched = local.with_suffix(".partial"), local.with_suffix(".fetched")
    if isinstance(place, str):
        remote.copy(place, str(fetched))
    if str(place).lower().endswith(parquet.SUFFIX):
        parquet.unpack(fetched if isinstance(place, str) else place, partial, images)
        fetched.unlink(missing_ok=True)
    else:
        fetched.replace(partial)
    partial.replace(local)


def _part(output: Path, shard: str, suffix: str) -> Path:
    return output / PARTS / f"{shard}.{suffix}"


def _units(source: Source, number: int) -> list[Unit]:
    """Cuts a data set into shards. Records are shuffled once, so that each shard is a fair sample
    of its data set and a window of few shards is not biased."""
    records = Records(source.annotation_files)
    order = permutation(len(records), 0, number)
    units = []
    for start in range(0, len(records), RECORDS_PER_SHARD):
        chosen = order[start : start + RECORDS_PER_SHARD]
        name = f"{number:03d}-{_slug(source)}-{start // RECORDS_PER_SHARD:05d}.tar"
        units.append(Unit(source, number, name, chosen, records.spans[chosen]))
    return units


def _slug(source: Source) -> str:
    """The data set's name as it may stand in file names and keys."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", source.name)


def write_unit(output: Path, unit: Unit) -> int:
    """Writes one tar file, its rows and its rejections; the rows come last and mean: complete.

    Returns the number of records.
    """
    writer = ShardWriter(output / unit.shard)
    rejections = []
    for number, span in zip(unit.numbers, unit.spans, strict=True):
        key = f"{_slug(unit.source)}/{number:08d}"
        try:
            file = unit.source.annotation_files[span["file"]]
            record = read_record(file, int(span["start"]), int(span["size"]))
            writer.add(key, *check_record(record, unit.source))
        except BadSample as error:
            rejections.append(Rejection(key, unit.source.name, str(error)))
    rows = writer.close()
    rows["source"] = unit.source_number
    lines = "".join(dump_line(rejection) for rejection in rejections)
    write_atomically(_part(output, unit.shard, REJECTED_FILE), lines.encode())
    write_atomically(_part(output, unit.shard, "npy"), rows.tobytes())
    return len(unit.numbers)


def check_record(record: Any, source: Source) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """The record and its image files (suffix, bytes), all found usable. Raises BadSample."""
    names = image_names(record) if isinstance(record, dict) else []
    files = [_read_image(name, source) for name in names]
    if files:
        record, files = take_pages(record, files, source.tiff_pages)
    parse_conversation(record, len(files))
    return record, [_checked_image(data, names) for data in files]


def _read_image(name: str, source: Source) -> bytes:
    if source.embedded_images is not None:
        data = parquet.read_embedded(source.embedded_images, name, MAX_IMAGE_BYTES)
        if data is not None:
            return data
    if source.image_url is not None:
        return remote.read_below(source.image_url, name, MAX_IMAGE_BYTES)
    path = find_image(name, source.image_roots)
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise BadSample(f"image {name}: larger than {MAX_IMAGE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise BadSample(f"image {name}: {error.strerror}") from error


def _checked_image(data: bytes, names: Sequence[str]) -> tuple[str, bytes]:
    """Suffix and bytes for the shard: decoded once to see that it can be, without metadata."""
    try:
        if is_dicom(data):
            return "png", encode_png(decode_dicom(data))
        pixels = images.decode(data)
        suffix, bare = strip_metadata(data)
        if bare != data and not np.array_equal(images.decode(bare), pixels):
            raise BadSample("its pixels change when metadata are removed")
        return suffix, bare
    except BadSample as error:
        raise BadSample(f"image {', '.join(names)}: {error}") from error


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
    save_index(output, index)
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
