"""Damaged input of every kind: each ends in a sample or in a reason, never in another error.

Five thousand mutations and more: bits flipped, parts cut out, doubled, or overwritten.
"""

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.images.privacy import strip_metadata
from megatron_gmai.data.ledger import BadSample, Rejection, dump_line, read_ledger
from megatron_gmai.data.shards.build import build_shards, check_record
from megatron_gmai.data.shards.foreign import index_shards
from megatron_gmai.data.shards.format import parse_sample
from megatron_gmai.data.shards.index import INDEX_FILE, MANIFEST_FILE, REJECTED_FILE
from megatron_gmai.data.shards.inputs import INPUTS_FILE, load_inputs
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.sources.mixture import MAX_RATIO, Source, read_list
from megatron_gmai.data.sources.records import Records, read_record
from tests.data.files import dicom
from tests.data.world import encoded, mixed_records, picture

MEMORY_LIMIT_KB = 1_500_000
INTERESTING = [b"\0", b"\xff" * 4, b"[" * 50, b"}", b'"', b"-1", b"9" * 30, b"\xed\xa0\x80", b"NaN"]


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_LIMIT_KB


def mutations(data: bytes, count: int) -> Iterator[bytes]:
    generator = np.random.default_rng(len(data))
    for _ in range(count):
        mutated = bytearray(data)
        for _ in range(generator.integers(1, 4)):
            first, last = sorted(generator.integers(0, len(data) + 1, 2))
            last = min(last, first + int(generator.choice([1, 8, 600])))
            kind = generator.integers(5)
            if kind == 0 and first < len(mutated):
                mutated[first] ^= 1 << int(generator.integers(8))
            elif kind == 1:
                del mutated[first:last]
            elif kind == 2:
                mutated[first:first] = mutated[first:last]
            elif kind == 3:
                mutated[first:last] = INTERESTING[generator.integers(len(INTERESTING))]
            else:
                del mutated[first:]
        yield bytes(mutated)


IMAGES = {
    **{
        kind: encoded(picture(40, 30), kind)
        for kind in ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP")
    },
    "deep PNG": encoded(Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)), "PNG"),
    "deep TIFF": encoded(Image.fromarray(np.arange(900, dtype=np.int32).reshape(30, 30)), "TIFF"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images(kind: str) -> None:
    decoded = 0
    for data in mutations(IMAGES[kind], 100):
        try:
            pixels = decode(data)
            strip_metadata(data)
        except BadSample as error:
            assert str(error)
        else:
            decoded += 1
            assert pixels.dtype == np.uint8 and pixels.ndim == 3
    assert decoded < 100


def test_dicom_files() -> None:
    for data in mutations(dicom(np.arange(256).reshape(16, 16)), 200):
        try:
            assert decode(data).dtype == np.uint8
        except BadSample as error:
            assert str(error)


def test_annotation_files_lose_no_record_silently(tmp_path: Path) -> None:
    """Each record of a file is stored or in the ledger, or the file as a whole is refused."""
    content = json.dumps(mixed_records(tmp_path, 4), indent=1).encode()
    refused = 0
    for number, data in enumerate(mutations(content, 1000)):
        file = tmp_path / f"data-{number}.json"
        file.write_bytes(data)
        try:
            records = Records([file])
        except ValueError as error:
            assert str(file) in str(error)
            refused += 1
            continue
        usable = 0
        for span in records.spans:
            try:
                record = read_record(file, int(span["start"]), int(span["size"]))
                check_record(record, Source("A", (file,), (tmp_path,)))
                usable += 1
            except BadSample as error:
                assert str(error)
        assert usable <= len(records)
    assert 0 < refused < 1000


def test_shards_made_from_damaged_annotations_account_for_every_record(tmp_path: Path) -> None:
    lines = [json.dumps(record).encode() for record in mixed_records(tmp_path, 5)]
    damaged = [
        data.replace(b"\n", b" ").replace(b"\r", b" ") or b"0"
        for line in lines
        for data in mutations(line, 60)
    ]
    damaged = [line for line in damaged if line.strip()]
    (tmp_path / "data.jsonl").write_bytes(b"{}\n" + b"\n".join(damaged))
    entry = {"image_dir": str(tmp_path), "annotations": "data.jsonl"}
    (tmp_path / "LIST.json").write_text(json.dumps({"A": entry}))
    manifest = build_shards(tmp_path / "LIST.json", tmp_path / "shards")
    assert manifest.samples + manifest.rejected == 1 + len(damaged)
    assert len(read_ledger(tmp_path / "shards" / "rejected.jsonl")) == manifest.rejected


def test_list_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    entry = {"image_dir": "", "annotations": str(tmp_path / "a.json"), "sample_ratio": 0.5}
    for data in mutations(json.dumps({"A": entry, "B": entry}).encode(), 600):
        (tmp_path / "LIST.json").write_bytes(data)
        try:
            read_list(tmp_path / "LIST.json")
        except ValueError as error:
            assert "list file" in str(error)


@pytest.fixture
def shards(tmp_path: Path, write_list: Callable) -> Path:
    build_shards(write_list(A=mixed_records(tmp_path, 6)), tmp_path / "shards")
    return tmp_path / "shards"


def test_tar_files_that_changed_are_noticed(shards: Path) -> None:
    (tar,) = shards.glob("*.tar")
    content = tar.read_bytes()
    originals = list(map(Shards(shards).read, range(6)))
    for data in mutations(content, 400):
        tar.write_bytes(data)
        opened = Shards(shards)
        for row, original in enumerate(originals):
            try:
                assert opened.read(row) == original
            except BadSample as error:
                assert "checksum" in str(error)


def test_tar_members_without_a_checksum(shards: Path) -> None:
    row = Shards(shards).rows[0]
    (tar,) = shards.glob("*.tar")
    span = tar.read_bytes()[int(row["offset"]) : int(row["offset"]) + int(row["size"])]
    for data in mutations(span, 800):
        try:
            assert isinstance(parse_sample(data).record, dict)
        except BadSample as error:
            assert str(error)


def read_everything(folder: Path) -> int:
    opened = Shards(folder)
    for row in range(len(opened)):
        opened.location(row), opened.source_name(row)
        try:
            sample = opened.read(row)
            assert opened.read_record(row) == (sample.key, sample.record)
        except BadSample as error:
            assert str(error)
    return len(opened)


def test_tar_files_of_others_lose_nothing_silently(shards: Path, tmp_path: Path) -> None:
    """Whatever was cut or changed, fewer samples than there were means a line in the ledger."""
    (tar,) = shards.glob("*.tar")
    folder = tmp_path / "foreign"
    folder.mkdir()
    for data in mutations(tar.read_bytes(), 300):
        for file in folder.iterdir():
            file.unlink()
        (folder / "a.tar").write_bytes(data)
        manifest = index_shards(folder)
        ledger = read_ledger(folder / REJECTED_FILE)
        assert manifest.rejected == len(ledger) == len({line.key for line in ledger})
        assert manifest.samples >= 6 or ledger
        assert read_everything(folder) == manifest.samples


@pytest.mark.parametrize(("name", "count"), [(MANIFEST_FILE, 500), (INDEX_FILE, 400)])
def test_index_files(shards: Path, name: str, count: int) -> None:
    for data in mutations((shards / name).read_bytes(), count):
        (shards / name).write_bytes(data)
        try:
            read_everything(shards)
        except ValueError as error:
            assert str(error)


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**40,
    10**400,
    1.5,
    float("nan"),
    "",
    "a",
    "../a.tar",
    "/dev/zero",
]
ODD += ["a/b.tar", "\0.tar", "\ud800", [], [[]], {}, {"a": 1}, "x" * 10_000]


def with_odd_fields(value: Any) -> Iterator[Any]:
    """The JSON value with each of its fields in turn odd, absent, or joined by an unknown one."""
    yield from ODD
    if isinstance(value, dict):
        yield {**value, "unknown": 1}
        for name, inner in value.items():
            yield {key: other for key, other in value.items() if key != name}
            yield from ({**value, name: odd} for odd in with_odd_fields(inner))
    elif isinstance(value, list):
        yield [*value, *value]
        for place, inner in enumerate(value):
            for odd in with_odd_fields(inner):
                yield [*value[:place], odd, *value[place + 1 :]]


def test_every_field_of_the_manifest(shards: Path) -> None:
    manifest = json.loads((shards / MANIFEST_FILE).read_text())
    expected = list(map(Shards(shards).read, range(6)))
    accepted = 0
    for changed in with_odd_fields(manifest):
        (shards / MANIFEST_FILE).write_text(json.dumps(changed))
        try:
            opened = Shards(shards)
            found = [opened.read(row) for row in range(len(opened))]
        except ValueError as error:
            assert str(error)
        else:
            assert found == expected, "no change of the manifest may change the samples"
            assert all(source.sample_ratio <= MAX_RATIO for source in opened.manifest.sources)
            accepted += 1
    assert accepted < 40, "names and ratios only"


def test_ledgers(shards: Path) -> None:
    line = Rejection("A/1", "A", "a reason", "LIST.json", "a.json", 3, "case 7", "a.png")
    content = (dump_line(line) * 3).encode()
    changed = [json.dumps(odd).encode() + b"\n" for odd in with_odd_fields(line._asdict())]
    for data in [*mutations(content, 400), *changed]:
        (shards / REJECTED_FILE).write_bytes(data)
        try:
            ledger = read_ledger(shards / REJECTED_FILE)
        except ValueError as error:
            assert "is damaged in line" in str(error)
        else:
            assert all(isinstance(one.key + one.reason, str) for one in ledger)


def test_records_of_inputs_are_used_whole_or_not_at_all(shards: Path) -> None:
    content = (shards / INPUTS_FILE).read_bytes()
    for data in mutations(content, 300):
        (shards / INPUTS_FILE).write_bytes(data)
        found = load_inputs(shards)
        assert found is None or all(unit.records >= 0 for unit in found.units.values())
