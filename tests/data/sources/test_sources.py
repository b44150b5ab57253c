"""Where data come from: Parquet with embedded images, URLs, folders that cannot be written to."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from megatron_gmai.config import DataConfig
from megatron_gmai.data.ledger import BadSample, read_ledger
from megatron_gmai.data.loading.dataset import open_dataset
from megatron_gmai.data.loading.loader import iterate
from megatron_gmai.data.prepare import prepare_data
from megatron_gmai.data.shards import check, fetch
from megatron_gmai.data.shards.build import build_shards
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.sources import parquet, remote
from megatron_gmai.data.sources.remote import read_below
from megatron_gmai.data.text.tokenizer import load_tokenizer
from tests.data.world import VISION, encoded, mixed_records, picture, record

PICTURES = [encoded(picture(seed=seed)) for seed in range(4)]


@pytest.fixture
def memory() -> Iterator[str]:
    """The URL of an empty folder in fsspec's memory."""
    yield "memory://hospital"
    fsspec.filesystem("memory").rm("/hospital", recursive=True)


def put(url: str, data: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(data)


def build(folder: Path, **entry: Any) -> Shards:
    (folder / "LIST.json").write_text(json.dumps({"A": entry}))
    build_shards(folder / "LIST.json", folder / "shards")
    return Shards(folder / "shards")


def stored_images(shards: Shards) -> list[tuple[bytes, ...]]:
    samples = sorted(map(shards.read, range(len(shards))), key=lambda sample: sample.key)
    return [sample.images for sample in samples]


class Refused(Exception):
    """As aiohttp's, which are no OSErrors."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def failing(errors: list[Any]) -> Any:
    """A method of fsspec's that raises one error after another, then does what it did before."""
    left = iter(errors)

    def method(files: MemoryFileSystem, path: str, *rest: Any, **more: Any) -> Any:
        for error in left:
            raise error
        name = next(n for n, value in vars(type(files)).items() if value is method)
        return getattr(super(MemoryFileSystem, files), name)(path, *rest, **more)

    return method


class TestParquet:
    def rows(self) -> list[dict[str, Any]]:
        hub = [{"bytes": data, "path": "lost.png"} for data in PICTURES]
        return [
            {**record("<image>what", "yes"), "images": [hub[0]]},
            {**record("what", "no"), "images": []},
            {**record("<image><image>what", "no"), "images": [hub[1], hub[2]]},
            {**record("<image>what", "no"), "images": [{"bytes": b"broken", "path": None}]},
        ]

    def write(self, path: Path, rows: list[dict[str, Any]]) -> None:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    def test_embedded_images_come_back_and_bad_ones_are_told(self, tmp_path: Path) -> None:
        self.write(tmp_path / "data.parquet", self.rows())
        shards = build(tmp_path, annotations="data.parquet")
        assert stored_images(shards) == [(PICTURES[0],), (), (PICTURES[1], PICTURES[2])]
        (line,) = read_ledger(tmp_path / "shards" / "rejected.jsonl")
        assert line.key == "A/00000003" and "not an image" in line.reason

    def test_a_column_of_bytes_and_conversations_as_text(self, tmp_path: Path) -> None:
        turns = json.dumps(record("<image>what", "yes")["conversations"])
        rows = [{"image": data, "conversations": turns} for data in PICTURES]
        for part in (0, 1):
            self.write(tmp_path / f"part-{part}.parquet", rows[2 * part : 2 * part + 2])
        shards = build(tmp_path, annotations=str(tmp_path))
        assert stored_images(shards) == [(data,) for data in PICTURES]

    def test_names_of_files_are_found_in_the_image_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(PICTURES[3])
        self.write(tmp_path / "data.parquet", [record("<image>what", "yes", "a.png")])
        shards = build(tmp_path, annotations="data.parquet", image_dir=str(tmp_path))
        assert stored_images(shards) == [(PICTURES[3],)]

    def test_a_damaged_file_is_one_clear_message(self, tmp_path: Path) -> None:
        self.write(tmp_path / "data.parquet", self.rows())
        content = (tmp_path / "data.parquet").read_bytes()
        (tmp_path / "data.parquet").write_bytes(content[:-20])
        with pytest.raises(ValueError, match=r"cannot read annotations .*data\.parquet"):
            build(tmp_path, annotations="data.parquet")

    def repeated(self, file: Path, size: int, rows: int = 64) -> None:
        """A column of one large value, stored once."""
        value = pyarrow.array([bytes(size)], pyarrow.binary())
        image = pyarrow.DictionaryArray.from_arrays([0] * rows, value)
        turns = pyarrow.array([json.dumps(record("<image>what", "yes")["conversations"])] * rows)
        table = pyarrow.table({"image": image, "conversations": turns})
        # Without Arrow's schema readers do not know that the values are shared.
        pyarrow.parquet.write_table(table, file, compression="zstd", store_schema=False)

    def test_a_small_file_may_not_unpack_without_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(parquet, "LEAST_BOUND", 2**22)
        file, images = tmp_path / "data.parquet", tmp_path / "images"
        self.repeated(file, 2**20)
        assert file.stat().st_size < 10_000
        with pytest.raises(ValueError, match=r"data\.parquet: it unpacks to more than 4194304"):
            parquet.unpack(file, tmp_path / "records", images, 2**30)
        assert images.stat().st_size <= 2**22

    def test_no_page_and_no_list_is_unpacked_that_is_too_large(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Files of a few hundred bytes."""
        monkeypatch.setattr(parquet, "LEAST_BOUND", 2**22)
        file = tmp_path / "data.parquet"
        values = pyarrow.array([bytes(2**20)], pyarrow.binary())
        many = pyarrow.DictionaryArray.from_arrays([0] * 500, values)
        hub = pyarrow.StructArray.from_arrays([many], names=["bytes"])
        before = pyarrow.default_memory_pool().max_memory()
        for items in (many, hub):  # one row
            table = pyarrow.table({"images": pyarrow.ListArray.from_arrays([0, 500], items)})
            pyarrow.parquet.write_table(table, file, compression="zstd", store_schema=False)
            with pytest.raises(ValueError, match="it unpacks to more than 4194304"):
                list(parquet.parquet_rows(file))
        for version in ("1.0", "2.0"):
            table = pyarrow.table({"image": pyarrow.array([bytes(2**23)], pyarrow.binary())})
            pyarrow.parquet.write_table(
                table, file, compression="zstd", use_dictionary=False, data_page_version=version
            )
            with pytest.raises(
                ValueError, match=r"a page of image of 83886\d\d bytes, at most 4194"
            ):
                list(parquet.parquet_rows(file))
        # The writer's copies count too: 500 MB would be the list's.
        assert pyarrow.default_memory_pool().max_memory() < max(before, 2**27)

    def test_one_row_is_held_at_a_time(self, tmp_path: Path) -> None:
        self.repeated(tmp_path / "data.parquet", 2**20)
        before = pyarrow.total_allocated_bytes()
        rows = parquet.parquet_rows(tmp_path / "data.parquet")
        next(rows)
        assert pyarrow.total_allocated_bytes() - before < 8 * 2**20

    def test_an_image_above_the_bound_is_not_unpacked_but_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in (fetch, check):
            monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 1000)
        self.repeated(tmp_path / "data.parquet", 1001, rows=1)
        shards = build(tmp_path, annotations="data.parquet")
        (line,) = read_ledger(tmp_path / "shards" / "rejected.jsonl")
        assert len(shards) == 0 and "larger than 1000 bytes" in line.reason
        parquet.unpack(tmp_path / "data.parquet", tmp_path / "records", tmp_path / "images", 1000)
        assert (tmp_path / "images").stat().st_size == 0


class TestUrls:
    def test_annotations_and_images(self, tmp_path: Path, memory: str) -> None:
        put(f"{memory}/images/a.png", PICTURES[0])
        records = [record("<image>what", "yes", "a.png"), record("<image>what", "no", "b.png")]
        put(f"{memory}/notes/one.json", json.dumps(records).encode())
        put(f"{memory}/notes/two.jsonl", json.dumps(record("what", "no")).encode())
        shards = build(tmp_path, annotations=f"{memory}/notes", image_dir=f"{memory}/images")
        assert stored_images(shards) == [(PICTURES[0],), ()]
        (line,) = read_ledger(tmp_path / "shards" / "rejected.jsonl")
        assert line.reason.startswith("image b.png: no such file in memory://")

    def test_images_lie_beside_the_annotations_by_default(
        self, tmp_path: Path, memory: str
    ) -> None:
        put(f"{memory}/a.png", PICTURES[1])
        put(f"{memory}/one.json", json.dumps([record("<image>what", "yes", "a.png")]).encode())
        assert stored_images(build(tmp_path, annotations=f"{memory}/one.json")) == [(PICTURES[1],)]

    @pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png", "file:///etc/hosts"])
    def test_names_do_not_leave_the_folder(self, memory: str, name: str) -> None:
        put(f"{memory}/a.png", PICTURES[1])
        with pytest.raises(BadSample, match="outside"):
            read_below(f"{memory}/images", name, 10**9)

    def test_what_a_store_says_about_one_image_is_quoted(
        self, memory: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(f"{memory}/a.png", PICTURES[0])
        monkeypatch.setattr(MemoryFileSystem, "size", failing([Refused("403,\n forbidden", 403)]))
        with pytest.raises(BadSample, match=f"cannot be read from {memory}: 403, forbidden") as e:
            read_below(memory, "a.png", 10)
        assert e.value.image == "a.png"

    def test_an_outage_is_waited_for_and_told(
        self, memory: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        put(f"{memory}/a.png", PICTURES[0])
        not_found = FileNotFoundError("a.png")  # as fsspec's HTTP calls all of its errors
        not_found.__cause__ = Refused("503, try later", 503)
        outages = [not_found, ConnectionResetError("reset"), TimeoutError(), Refused("slow", 429)]
        monkeypatch.setattr(remote, "PAUSES_S", (0.0,) * len(outages))
        for name in ("size", "cat_file", "info"):
            with monkeypatch.context() as patch:
                patch.setattr(MemoryFileSystem, name, failing(outages))
                assert read_below(memory, "a.png", 10**9) == PICTURES[0]
                assert remote.read_span(f"{memory}/a.png", 1, 3) == PICTURES[0][1:4]
                assert remote.exists(f"{memory}/a.png") and not remote.exists(f"{memory}/b.png")
        told = capsys.readouterr().err
        assert all(told.count(text) >= 3 for text in ("503, try later; trying again", "TimeoutErr"))

    def test_an_outage_that_lasts_ends_the_run_and_rejects_nothing(
        self, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(f"{memory}/a.png", PICTURES[0])
        put(f"{memory}/one.json", json.dumps([record("<image>what", "yes", "a.png")]).encode())
        monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0))
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, "cat_file", failing([OSError("no route")] * 9))
            with pytest.raises(
                remote.Outage, match=r"cannot read memory://.*a\.png: no route, 3 t"
            ):
                build(tmp_path, annotations=f"{memory}/one.json")
        assert stored_images(build(tmp_path, annotations=f"{memory}/one.json")) == [(PICTURES[0],)]

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [(RuntimeError("payload is not complete"), "not complete, 1 times"),
         (b"", "0 of 1024 bytes"), (bytes(9999), "reads files whole only")],
    )  # fmt: skip
    def test_shards_behind_a_server_that_fails_are_one_error(
        self, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch, answer: Any, reason: str
    ) -> None:
        (tmp_path / "a.json").write_text(json.dumps([record("what", "yes")]))
        built = build(tmp_path, annotations="a.json").folder
        (built / "origin").write_text(memory)
        put(f"{memory}/index.json", b"")
        monkeypatch.setattr(remote, "PAUSES_S", ())

        def cat_file(*_: object) -> bytes:
            if isinstance(answer, Exception):
                raise answer
            return bytes(answer)

        monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
        with pytest.raises(ValueError, match=f"cannot read memory://.*tar: .*{reason}") as e:
            Shards(built).read(0)
        assert not isinstance(e.value, BadSample)

    def test_a_size_that_is_not_told_is_measured(
        self, memory: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(f"{memory}/images/a.png", b"0123456789")
        monkeypatch.setattr(MemoryFileSystem, "size", lambda self, path: None)
        assert read_below(f"{memory}/images", "a.png", 10) == b"0123456789"
        with pytest.raises(BadSample, match="larger than 9 bytes"):
            read_below(f"{memory}/images", "a.png", 9)

    def test_changed_annotations_are_noticed(self, tmp_path: Path, memory: str) -> None:
        put(f"{memory}/one.json", json.dumps([record("what", "yes")]).encode())
        build(tmp_path, annotations=f"{memory}/one.json")
        changed = record("what", "yes, it is")
        put(f"{memory}/one.json", json.dumps([changed]).encode())
        shards = build(tmp_path, annotations=f"{memory}/one.json")
        assert shards.read(0).record == changed

    @pytest.mark.parametrize("url", ["nothing://at.all/x.json", "memory://nowhere/x.json"])
    def test_a_place_that_cannot_be_read_is_one_clear_message(
        self, tmp_path: Path, url: str
    ) -> None:
        with pytest.raises(ValueError, match=f"A: .*{url}"):
            build(tmp_path, annotations=url)


def batches(data: DataConfig, tokenizer: Path, cache: Path) -> list[Any]:
    data = dataclasses.replace(data, tokenizer=str(tokenizer), max_length=128, max_rejected=0.9)
    data = prepare_data(data, VISION, cache)
    dataset = open_dataset(data, load_tokenizer(tokenizer), VISION, 1, None)
    found = iterate(dataset, 0, 1, 1, 1, total_packs=dataset.total_packs(1))
    return [(b.keys, b.tokens.tolist(), b.pixel_values.tolist()) for b in found]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "a.json").write_text(json.dumps(mixed_records(tmp_path, 9)))
    return build(tmp_path, annotations="a.json", image_dir=str(tmp_path)).folder


def test_shards_behind_a_url_give_the_same_batches(
    shards: Path, tmp_path: Path, memory: str, tokenizer_file: Path
) -> None:
    for file in shards.iterdir():
        put(f"{memory}/{file.name}", file.read_bytes())
    here = batches(DataConfig(shards=str(shards)), tokenizer_file, tmp_path / "cache")
    assert batches(DataConfig(shards=memory), tokenizer_file, tmp_path / "cache") == here


def test_a_folder_that_cannot_be_written_to_is_left_alone(
    shards: Path, tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(shards.iterdir())
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != shards)
    data = DataConfig(shards=str(shards))
    assert len(batches(data, tokenizer_file, tmp_path / "cache")) > 0
    assert sorted(shards.iterdir()) == before
