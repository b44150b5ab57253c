"""Makes shards from the data sets of a list file: every record checked, every image decoded once.

Work is cut into units, one tar file each, which depend on nothing but their records and images. A
unit is made again only if those have changed, after a crash as well as in a later run.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.images.nifti import parse_rule
from megatron_gmai.data.ledger import BadSample, Rejection, dump_line, read_ledger
from megatron_gmai.data.lock import building, is_read_only
from megatron_gmai.data.pool import Report, WorkerDied, run_jobs
from megatron_gmai.data.progress import Progress
from megatron_gmai.data.shards.check import check_record
from megatron_gmai.data.shards.fetch import at_hand
from megatron_gmai.data.shards.format import ShardWriter
from megatron_gmai.data.shards.index import (
    INDEX_FILE,
    MANIFEST_FILE,
    REJECTED_FILE,
    ROW,
    Manifest,
    ShardFile,
    SourceInfo,
    check_rows,
    read_manifest,
    save_index,
    write_manifest,
)
from megatron_gmai.data.shards.inputs import (
    Inputs,
    UnitInputs,
    annotations_of,
    changes,
    load_inputs,
    means_of,
    save_inputs,
)
from megatron_gmai.data.shards.lengths import LengthParts
from megatron_gmai.data.shards.parts import load_part, save_part
from megatron_gmai.data.shards.units import Fingerprint, Unit, cut_units, unit_fingerprint
from megatron_gmai.data.sources.mixture import Source, read_list
from megatron_gmai.data.sources.records import parse_record
from megatron_gmai.data.text.encoder import Encoder

PARTS = ".parts"
Log = Callable[[str], None]


def build_shards(
    list_file: str | os.PathLike[str],
    output: str | os.PathLike[str],
    workers: int = 0,
    tiff_pages: str = "first",
    image_root: str | None = None,
    encoder: Encoder | None = None,
    log: Log = lambda line: None,
) -> Manifest:
    """Makes shards in `output`, or finds them made from the same inputs, and tells `log` which.

    `workers` processes share the work (0: this one does it); `take_pages` explains `tiff_pages`,
    `find_image` the `image_root`. With an `encoder` token lengths are measured on the way. Another
    builder of the same folder is waited for. Raises ValueError for a list that cannot be used, for
    a folder that holds shards of other data sets, and where a record ends a worker.
    """
    allowed = None if image_root is None else Path(image_root)
    sources = [
        dataclasses.replace(source, tiff_pages=tiff_pages, allowed_root=allowed)
        for source in read_list(list_file)
    ]
    if allowed is not None and not allowed.is_dir():
        raise ValueError(f"--image-root {image_root} is no folder")
    for source in sources:
        if source.nifti_slices is not None:
            parse_rule(source.nifti_slices)
    with building(Path(output), log) as holder:
        progress = Progress(log, holder.tell)
        try:
            return _Build(sources, Path(output), workers, encoder, log, progress).run()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                f"{error.strerror} in {output}; with more space the same command goes on from here"
            ) from error


class _Build:
    def __init__(
        self,
        sources: Sequence[Source],
        output: Path,
        workers: int,
        encoder: Encoder | None,
        log: Log,
        progress: Progress,
    ) -> None:
        self.sources, self.output, self.workers = sources, output, workers
        self.encoder, self.log, self.progress = encoder, log, progress
        self.annotations, self.means = annotations_of(sources), means_of(sources)
        self.is_read_only = is_read_only(output)

    def run(self) -> Manifest:
        complete = (self.output / MANIFEST_FILE).exists()
        old = self._earlier() if complete else None
        lost = self._lost() if old is not None else set()
        if old is not None and not lost and self._is_unchanged(old):
            self.log(f"shards in {self.output}: reused, their inputs are unchanged")
            return self._with_uses(read_manifest(self.output))
        if self.is_read_only:
            raise ValueError(
                f"{self.output} cannot be written to, and its shards are not those of this list "
                "as it is now; choose another folder (--dset-from-cache takes them as they are)"
            )
        (self.output / PARTS).mkdir(exist_ok=True)
        sources = [at_hand(source, self.output / PARTS) for source in self.sources]
        units = [unit for source in sources for unit in cut_units(source)]
        self._tell_lengths(sources, units)
        if old is not None:
            self._take_apart(units, old, lost)
        missing = self._missing(units)
        if old is not None:
            self._tell_changes(old, lost, len(units) - len(missing), len(units))
        self._write(missing)
        return self._finish(units)

    def _earlier(self) -> Inputs | None:
        """The inputs of the shards that are there, None if their index is damaged. Raises
        ValueError if those are of other data."""
        old = load_inputs(self.output)
        if old is None or not old.annotations.keys() & self.annotations.keys():
            raise ValueError(
                f"the shards in {self.output} were made from other data sets or by an earlier "
                "version; delete the folder or choose another (--dset-from-cache takes them as "
                "they are)"
            )
        try:
            rows = np.load(self.output / INDEX_FILE, mmap_mode="r")
            check_rows(rows, read_manifest(self.output))
        except Exception as error:  # numpy raises anything on damaged headers
            self.log(f"shards in {self.output}: {error}; all are made anew")
            if not self.is_read_only:
                (self.output / MANIFEST_FILE).unlink()
            return None
        return old

    def _lost(self) -> set[str]:
        """Shards whose tar file is gone, or has another size than the index says."""
        sizes = {file.name: file.stat().st_size for file in self.output.glob("*.tar")}
        shards = read_manifest(self.output).shards
        return {shard.name for shard in shards if sizes.get(shard.name) != shard.size}

    def _with_uses(self, manifest: Manifest) -> Manifest:
        """The manifest with the list's ratios, which no tar file depends on."""
        uses = {source.name: source for source in self.sources}
        infos = []
        for info in manifest.sources:
            ratio, augment = uses[info.name].sample_ratio, uses[info.name].data_augment
            if ratio != info.sample_ratio:
                self.log(f"{info.name}: ratio {info.sample_ratio:g} before, {ratio:g} now")
            infos.append(dataclasses.replace(info, sample_ratio=ratio, data_augment=augment))
        updated = dataclasses.replace(manifest, sources=tuple(infos))
        if updated != manifest and not self.is_read_only:
            write_manifest(self.output, updated)
        return updated

    def _is_unchanged(self, old: Inputs) -> bool:
        """Whether annotations, means and images are as they were. Of annotations that have to be
        copied first, and of images in them or behind URLs, the copies' versions have to do."""
        rejected = any(unit.rejected for unit in old.units.values())
        if old.annotations != self.annotations or (rejected and old.means != self.means):
            return False
        place = None if self.is_read_only else self.output
        with tempfile.TemporaryDirectory(dir=place) as folder:  # for what gzip packs
            local = [at_hand(s, Path(folder)) for s in self.sources if s.is_local]
            units = [unit for source in local for unit in cut_units(source)]
            return self._unchanged(units, old.units) == len(units)

    def _unchanged(self, units: Sequence[Unit], known: dict[str, UnitInputs]) -> int:
        """How many of the units have the fingerprint that is known of them."""
        return sum(
            unit.shard in known and known[unit.shard].fingerprint == fingerprint
            for unit, fingerprint in self._fingerprints(units)
        )

    def _fingerprints(self, units: Sequence[Unit]) -> Iterable[tuple[Unit, str]]:
        self.progress.begin("checking inputs", sum(len(unit.numbers) for unit in units))
        workers = self.workers if len(units) > 16 else 0
        for number, value in run_jobs(unit_fingerprint, units, workers, self.progress):
            yield units[number], value

    def _take_apart(self, units: Sequence[Unit], old: Inputs, lost: set[str]) -> None:
        """Turns complete shards back into parts, of which those that are unchanged can stay."""
        manifest, rows = read_manifest(self.output), np.load(self.output / INDEX_FILE)
        ledger = {line.key: line for line in read_ledger(self.output / REJECTED_FILE)}
        counts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
        where = {shard.name: n for n, shard in enumerate(manifest.shards)}
        for unit in units:
            if unit.shard not in old.units or unit.shard in lost:
                continue
            number = where.get(unit.shard)
            own = rows[:0] if number is None else rows[counts[number] : counts[number + 1]]
            keys = map(unit.key, unit.numbers.tolist())
            rejections = [ledger[key] for key in keys if key in ledger]
            known = old.units[unit.shard]
            if len(rejections) == known.rejected:  # else the ledger is not whole
                save_part(self.output / PARTS, unit, own, rejections, known.fingerprint)
        write_atomically(self.output / PARTS / "means.json", json.dumps(old.means).encode())
        (self.output / MANIFEST_FILE).unlink()
        wanted = {unit.shard for unit in units}
        for name in where.keys() - wanted:
            (self.output / name).unlink(missing_ok=True)

    def _missing(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that have no part which is still right."""
        means_file = self.output / PARTS / "means.json"
        same_means = means_file.exists() and json.loads(means_file.read_text()) == self.means
        parts = {unit.shard: load_part(self.output / PARTS, unit) for unit in units}
        known = [unit for unit in units if parts[unit.shard] is not None]
        kept = set()
        for unit, fingerprint in self._fingerprints(known):
            part = parts[unit.shard]
            if part and part[0] == fingerprint and (same_means or not part[1]):
                kept.add(unit.shard)
        missing = [unit for unit in units if unit.shard not in kept]
        for unit in missing:
            (self.output / PARTS / f"{unit.shard}.json").unlink(missing_ok=True)
        write_atomically(means_file, json.dumps(self.means).encode())
        return missing

    def _tell_changes(self, old: Inputs, lost: set[str], kept: int, total: int) -> None:
        new = Inputs(self.annotations, self.means, {})
        for line in changes(old, new, lost):
            self.log(f"shards in {self.output}: {line}")
        self.log(f"shards in {self.output}: {kept} of {total} kept, the others are made anew")

    def _tell_lengths(self, sources: Sequence[Source], units: Sequence[Unit]) -> None:
        for source in sources:
            count = sum(len(unit.numbers) for unit in units if unit.source is source)
            if source.length is not None and source.length != count:
                self.log(f"{source.name}: 'length' is {source.length}, found {count} records")
            if not count:
                self.log(f"{source.name}: its annotations hold no records")
            if count and count * source.sample_ratio < 0.5:
                ratio = source.sample_ratio
                self.log(f"{source.name}: a ratio of {ratio:g} takes none of {count} samples")

    def _write(self, units: Sequence[Unit]) -> None:
        total, size = sum(len(unit.numbers) for unit in units), sum(unit.size for unit in units)
        self.progress.begin("making shards", total, size)
        work = partial(write_unit, self.output, self.encoder)
        workers = self.workers if len(units) > 1 else 0
        try:
            for _ in run_jobs(work, units, workers, self.progress):
                pass
        except WorkerDied as error:
            raise ValueError(
                f"{error} at {_describe(error.job, error.item)}; try fewer --workers, or take the "
                "record out. The same command goes on from here"
            ) from error

    def _finish(self, units: Sequence[Unit]) -> Manifest:
        """Joins the units' rows into the index. Shards without a usable sample are left out."""
        shards: list[ShardFile] = []
        rows = [np.empty(0, dtype=ROW)]
        rejections: list[Rejection] = []
        inputs: dict[str, UnitInputs] = {}
        names = [source.name for source in self.sources]
        for unit in units:
            part = load_part(self.output / PARTS, unit)
            assert part is not None
            fingerprint, rejected, own = part
            inputs[unit.shard] = UnitInputs(fingerprint, len(unit.numbers), len(rejected))
            rejections += rejected
            file = self.output / unit.shard
            if not len(own):
                file.unlink(missing_ok=True)
                continue
            own["shard"], own["source"] = len(shards), names.index(unit.source.name)
            shards.append(ShardFile(unit.shard, len(own), file.stat().st_size))
            rows.append(own)
        lines = "".join(map(dump_line, rejections)).encode()
        write_atomically(self.output / REJECTED_FILE, lines)
        index = np.concatenate(rows)
        save_index(self.output, index)
        save_inputs(self.output, Inputs(self.annotations, self.means, inputs))
        manifest = Manifest(tuple(shards), self._infos(index, rejections), _contents(shards, index))
        write_manifest(self.output, manifest)
        shutil.rmtree(self.output / PARTS)
        return manifest

    def _infos(self, index: np.ndarray, rejections: list[Rejection]) -> tuple[SourceInfo, ...]:
        counts = np.bincount(index["source"], minlength=len(self.sources))
        rejected = [sum(line.source == s.name for line in rejections) for s in self.sources]
        return tuple(
            SourceInfo(source.name, source.sample_ratio, source.data_augment, int(n), bad)
            for source, n, bad in zip(self.sources, counts, rejected, strict=True)
        )


def _contents(shards: Sequence[ShardFile], index: np.ndarray) -> str:
    """Changes with any sample: what a plan and token lengths are bound to."""
    digest = hashlib.sha256(repr([shard.name for shard in shards]).encode())
    digest.update(index.tobytes())
    return digest.hexdigest()[:16]


def write_unit(output: Path, encoder: Encoder | None, unit: Unit, report: Report) -> None:
    """Writes one tar file, its rows, its rejections and its token lengths."""
    writer, rejections, size = ShardWriter(output / unit.shard), list[Rejection](), 0
    fingerprint = Fingerprint(unit)
    lengths = None if encoder is None else LengthParts(output, encoder)
    for done, (number, span, text) in enumerate(unit.texts()):
        report(done, size)
        key, record = unit.key(number), None
        try:
            record = parse_record(text)
            located = fingerprint.add(text, record)
            checked, images = check_record(record, unit.source, located)
            offset = writer.add(key, checked, images)
            size += sum(len(data) for _, data in images)
            if lengths is not None:
                sample = f"{unit.shard}@{offset}"
                lengths.measure(checked, len(images), sample, key, unit.source.name)
        except BadSample as error:
            if record is None:
                fingerprint.add(text, None)
            rejections.append(
                Rejection(
                    key,
                    unit.source.name,
                    str(error),
                    unit.source.list_file,
                    str(unit.source.original(int(span["file"]))),
                    int(span["number"]),
                    _record_id(record),
                    error.image,
                )
            )
    report(len(unit.numbers), size)
    rows = writer.close()
    if lengths is not None:
        lengths.save(unit.shard, rows)
    save_part(output / PARTS, unit, rows, rejections, fingerprint.value())


def _record_id(record: object) -> str:
    value = record.get("id") if isinstance(record, dict) else None
    return str(value)[:200] if isinstance(value, str | int) else ""


def _describe(unit: Unit, item: int) -> str:
    """Where a record is to be found."""
    if item >= len(unit.numbers):
        return f"the end of {unit.shard}"
    file = unit.source.original(int(unit.spans[item]["file"]))
    return f"record {unit.spans[item]['number']} of {file} ({unit.key(int(unit.numbers[item]))})"
