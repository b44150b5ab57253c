"""Damaged input of every kind: each ends in a sample or in a reason, never in another error.

Two thousand and more mutations: bits flipped, parts cut out, doubled, or overwritten.
"""

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.images.privacy import strip_metadata
from megatron_gmai.data.ledger import BadSample, read_ledger
from megatron_gmai.data.shards.build import build_shards, check_record
from megatron_gmai.data.shards.format import parse_sample
from megatron_gmai.data.shards.index import INDEX_FILE, MANIFEST_FILE
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.sources.mixture import Source, read_list
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
    for number, data in enumerate(mutations(content, 300)):
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
    assert 0 < refused < 300


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
    for data in mutations(json.dumps({"A": entry, "B": entry}).encode(), 300):
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
    for data in mutations(content, 300):
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
    for data in mutations(span, 400):
        try:
            assert isinstance(parse_sample(data).record, dict)
        except BadSample as error:
            assert str(error)


@pytest.mark.parametrize("name", [MANIFEST_FILE, INDEX_FILE])
def test_index_files(shards: Path, name: str) -> None:
    for data in mutations((shards / name).read_bytes(), 100):
        (shards / name).write_bytes(data)
        try:
            opened = Shards(shards)
            for row in range(len(opened)):
                opened.read(row)
        except ValueError as error:
            assert str(error)
