"""Making shards: every sample is stored or told in the ledger, whatever the input looks like."""

import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from megatron_gmai.chat_formats import chat_format
from megatron_gmai.data.ledger import BadSample, read_ledger
from megatron_gmai.data.pool import Report
from megatron_gmai.data.shards import build, lengths, units
from megatron_gmai.data.shards.build import build_shards
from megatron_gmai.data.shards.index import MANIFEST_FILE
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.text.encoder import Encoder
from megatron_gmai.data.text.tokenizer import Tokenizer
from tests.data.world import encoded, mixed_records, open_list, picture, record
from tools.make_shards import main


def test_samples_come_back_as_they_went_in(tmp_path: Path, write_list: Callable) -> None:
    records = mixed_records(tmp_path, 12)
    build_shards(write_list(A=records), tmp_path / "shards")
    shards = Shards(tmp_path / "shards")
    stored = {sample.key: sample for sample in map(shards.read, range(len(shards)))}
    assert sorted(stored) == [f"A/{i:08d}" for i in range(12)]
    for i, original in enumerate(records):
        sample = stored[f"A/{i:08d}"]
        assert sample.record == original
        names = original.get("image", [])
        names = [names] if isinstance(names, str) else names
        assert list(sample.images) == [(tmp_path / name).read_bytes() for name in names]


def test_plain_webdataset_reads_the_shards(tmp_path: Path, write_list: Callable) -> None:
    build_shards(write_list(A=mixed_records(tmp_path, 12)), tmp_path / "shards")
    (tar,) = (tmp_path / "shards").glob("*.tar")
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False).decode("pil"))
    assert len(samples) == 12
    assert all(sample["json"]["conversations"] for sample in samples)
    assert sum("0.png" in sample for sample in samples) == 8


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, write_list: Callable) -> None:
    list_file = write_list(A=mixed_records(tmp_path, 12))
    for folder in ("one", "two"):
        build_shards(list_file, tmp_path / folder)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_several_processes_make_the_same_shards(
    tmp_path: Path, write_list: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "RECORDS_PER_SHARD", 3)
    list_file = write_list(A=mixed_records(tmp_path, 12))
    alone = build_shards(list_file, tmp_path / "alone")
    assert build_shards(list_file, tmp_path / "many", workers=2) == alone
    assert len(alone.shards) == 4
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes()


def test_tar_members_carry_no_owner_and_no_time(tmp_path: Path, write_list: Callable) -> None:
    build_shards(write_list(A=mixed_records(tmp_path, 3)), tmp_path / "shards")
    (tar,) = (tmp_path / "shards").glob("*.tar")
    with tarfile.open(tar) as archive:
        assert {(m.uid, m.gid, m.uname, m.mtime) for m in archive} == {(0, 0, "", 0)}


class TestInterruption:
    def test_an_unfinished_folder_is_refused(self, tmp_path: Path, write_list: Callable) -> None:
        build_shards(write_list(A=mixed_records(tmp_path, 3)), tmp_path / "shards")
        (tmp_path / "shards" / MANIFEST_FILE).unlink()
        with pytest.raises(ValueError, match="tools/make_shards.py"):
            Shards(tmp_path / "shards")

    def test_complete_shards_are_not_made_again_and_nothing_is_doubled(
        self, tmp_path: Path, write_list: Callable, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(units, "RECORDS_PER_SHARD", 4)
        list_file = write_list(A=mixed_records(tmp_path, 12))
        build_shards(list_file, tmp_path / "whole")
        written: list[str] = []
        write_unit = build.write_unit

        def crash_at_the_third(
            output: Path, encoder: None, unit: units.Unit, report: Report
        ) -> None:
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(unit.shard)
            write_unit(output, encoder, unit, report)

        monkeypatch.setattr(build, "write_unit", crash_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            build_shards(list_file, tmp_path / "shards")
        kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("*.tar")}
        monkeypatch.setattr(build, "write_unit", write_unit)
        build_shards(list_file, tmp_path / "shards")
        assert len(kept) == 2
        for path in (tmp_path / "whole").iterdir():
            found = tmp_path / "shards" / path.name
            assert found.read_bytes() == path.read_bytes()
            assert kept.get(path.name, found.stat().st_mtime_ns) == found.stat().st_mtime_ns

    def test_a_second_run_finds_everything_done(self, tmp_path: Path, write_list: Callable) -> None:
        list_file = write_list(A=mixed_records(tmp_path, 3))
        first = build_shards(list_file, tmp_path / "shards")
        assert build_shards(list_file, tmp_path / "shards") == first

    def test_annotations_that_were_only_touched_are_the_same(
        self, tmp_path: Path, write_list: Callable
    ) -> None:
        list_file = write_list(A=mixed_records(tmp_path, 3))
        first = build_shards(list_file, tmp_path / "shards")
        os.utime(tmp_path / "A.json", (1, 1))
        assert build_shards(list_file, tmp_path / "shards") == first

    def test_shards_of_other_data_are_not_overwritten(
        self, tmp_path: Path, write_list: Callable
    ) -> None:
        build_shards(write_list(A=mixed_records(tmp_path, 3)), tmp_path / "shards")
        with pytest.raises(ValueError, match="made from other data sets"):
            build_shards(write_list(B=mixed_records(tmp_path, 4)), tmp_path / "shards")


GOOD = record("what", "yes")
BAD_RECORDS: dict[str, tuple[Any, str]] = {
    "no conversations": ({"image": "good.png"}, "no conversations"),
    "empty conversations": ({"conversations": []}, "no conversations"),
    "not an object": (17, "must be a JSON object"),
    "more tags than images": (record("<image><image>", "a", "good.png"), "2 <image> .* 1 image"),
    "fewer tags than images": (
        record("<image>", "a", ["good.png", "good.png"]),
        "1 <image> .* 2 image",
    ),
    "a tag and no image": (record("<image> what", "a"), "1 <image> .* 0 image"),
    "an image and no tag": (record("what", "a", "good.png"), "0 <image> .* 1 image"),
    "missing image": (record("<image>", "a", "lost.png"), "lost.png: no such file"),
    "truncated JPEG": (record("<image>", "a", "cut.jpg"), "cut.jpg: cannot decode"),
    "no image at all": (record("<image>", "a", "text.png"), "text.png: not an image"),
    "leaves the folder": (record("<image>", "a", "../secret.png"), "secret.png: outside"),
    "absolute path": (record("<image>", "a", "/etc/hostname"), "hostname: outside"),
    "link out of the folder": (record("<image>", "a", "link.png"), "link.png: outside"),
    "folder as image": (record("<image>", "a", "."), "a folder, not a file"),
    "image is a number": (record("<image>", "a", 3), "'image' must be"),
    "image by another name": (record("what", "a", Image="good.png"), "'Image' is not read"),
    "a video": (record("what", "a", video="good.mp4"), "'video' is not read"),
}


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    picture().save(folder / "good.png")
    picture().save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "cut.jpg").write_bytes(encoded(picture(90, 90), "JPEG")[:900])
    (folder / "text.png").write_text("no image")
    return folder


def write_annotations(folder: Path, records: list[Any]) -> Path:
    (folder / "data.json").write_text(json.dumps(records))
    entry = {"image_dir": str(folder), "annotations": str(folder / "data.json")}
    (folder / "LIST.json").write_text(json.dumps({"NAME": entry}))
    return folder / "LIST.json"


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_told_with_its_reason_and_costs_no_other(
    image_folder: Path, tmp_path: Path, name: str
) -> None:
    bad, reason = BAD_RECORDS[name]
    list_file = write_annotations(image_folder, [GOOD, bad, GOOD])
    manifest = build_shards(list_file, tmp_path / "shards")
    (line,) = read_ledger(tmp_path / "shards" / "rejected.jsonl")
    assert (manifest.samples, manifest.rejected) == (2, 1)
    assert line.key == "NAME/00000001" and line.source == "NAME"
    assert re.search(reason, line.reason), line.reason


def test_the_run_has_the_whole_ledger_once(
    image_folder: Path, tmp_path: Path, tokenizer_file: Path
) -> None:
    long = record("what " * 200, "yes")
    records = [GOOD, long, *(bad for bad, _ in BAD_RECORDS.values())]
    list_file = write_annotations(image_folder, records)
    for _ in range(2):
        dataset = open_list(
            list_file, tokenizer_file, tmp_path / "work" / "rejected.jsonl", max_rejected=0.99
        )
        assert len(dataset.ledger) == len(records) - 1
    lines = (tmp_path / "work" / "rejected.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    (too_long,) = [line for line in told if "--max-length 128" in line["reason"]]
    assert too_long["id"] == "NAME/00000001" and too_long["key"].startswith("NAME-00000.tar@")
    keys = [line["key"] for line in told if line is not too_long]
    assert sorted(keys) == [f"NAME/{i:08d}" for i in range(2, len(records))]


def test_too_many_bad_samples_stop_the_run_with_the_ledger_written(
    image_folder: Path, tmp_path: Path, tokenizer_file: Path
) -> None:
    list_file = write_annotations(image_folder, [GOOD, BAD_RECORDS["missing image"][0]])
    with pytest.raises(
        ValueError,
        match=r"(?s)1 of 2 samples cannot be used.*--max-rejected 0.4.*lost.png: no such file",
    ):
        open_list(list_file, tokenizer_file, tmp_path / "rejected.jsonl", max_rejected=0.4)
    assert len(read_ledger(tmp_path / "rejected.jsonl")) == 1


def test_a_ledger_of_earlier_data_does_not_count(
    image_folder: Path, tmp_path: Path, tokenizer_file: Path
) -> None:
    ledger = tmp_path / "rejected.jsonl"
    ledger.write_text('{"key": "OLD/0", "source": "OLD", "reason": "gone"}\n')
    dataset = open_list(
        write_annotations(image_folder, [GOOD]), tokenizer_file, ledger, max_rejected=0.0
    )
    assert not dataset.rejected and len(read_ledger(ledger)) == 1


def test_no_usable_sample_is_one_clear_message(
    image_folder: Path, tmp_path: Path, tokenizer_file: Path
) -> None:
    list_file = write_annotations(image_folder, [BAD_RECORDS["truncated JPEG"][0]])
    with pytest.raises(ValueError, match="1 of 1 samples cannot be used"):
        open_list(list_file, tokenizer_file, tmp_path / "rejected.jsonl", max_rejected=1.0)
    assert len(read_ledger(tmp_path / "rejected.jsonl")) == 1


def test_deep_images_are_stored_untouched(image_folder: Path, tmp_path: Path) -> None:
    ramp = np.linspace(0, 40950, 10_000).reshape(100, 100).astype(np.uint16)
    for name in ("deep.tif", "deep.png"):
        Image.fromarray(ramp).save(image_folder / name)
    records = [record("<image>", "a", "deep.tif"), record("<image>", "a", "deep.png")]
    assert build_shards(write_annotations(image_folder, records), tmp_path / "shards").samples == 2


def test_json_lines_with_a_broken_line(tmp_path: Path) -> None:
    lines = [json.dumps(GOOD), '{"conversations": [', "", json.dumps(GOOD)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "LIST.json").write_text(json.dumps({"N": {"annotations": "data.jsonl"}}))
    manifest = build_shards(tmp_path / "LIST.json", tmp_path / "shards")
    assert (manifest.samples, manifest.rejected) == (2, 1)


@pytest.mark.parametrize("content", ["[{", "[1, 2", "[1 2]", "[1,", b"[\xff\xfe]"])
def test_an_unreadable_annotation_file_is_one_clear_message(
    tmp_path: Path, content: str | bytes
) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "data.json").write_bytes(raw)
    (tmp_path / "LIST.json").write_text(json.dumps({"N": {"annotations": "data.json"}}))
    with pytest.raises(ValueError, match=r"annotations .*data\.json"):
        build_shards(tmp_path / "LIST.json", tmp_path / "shards")


class TestCommand:
    """tools/make_shards.py"""

    def test_prints_counts_and_keeps_the_tokenizer(
        self,
        image_folder: Path,
        tmp_path: Path,
        tokenizer_file: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        list_file = write_annotations(image_folder, [GOOD, BAD_RECORDS["missing image"][0]])
        output = tmp_path / "shards"
        status = main(
            [
                "--datasets",
                str(list_file),
                "--output",
                str(output),
                "--tokenizer",
                str(tokenizer_file),
            ]
        )
        assert status == 0
        assert (output / "tokenizer.model").read_bytes() == tokenizer_file.read_bytes()
        assert "NAME            1         1" in capsys.readouterr().out

    def test_a_mistake_is_one_line_and_a_status(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status = main(["--datasets", str(tmp_path / "no.json"), "--output", str(tmp_path / "o")])
        assert status == 2
        assert capsys.readouterr().err.count("\n") == 1


class TestTokenLengths:
    def test_several_processes_measure_the_same(
        self,
        tmp_path: Path,
        write_list: Callable,
        tokenizer: Tokenizer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(units, "RECORDS_PER_SHARD", 5)
        build_shards(write_list(A=mixed_records(tmp_path, 12)), tmp_path / "shards")
        shards = Shards(tmp_path / "shards")
        encoder = Encoder(tokenizer, chat_format("internlm2"), 4, 40)
        alone, rejected = lengths.token_lengths(shards, encoder)
        for file in shards.folder.glob("lengths-*"):
            file.unlink()
        together, rejected_together = lengths.token_lengths(shards, encoder, workers=2)
        assert together.tolist() == alone.tolist() and rejected == rejected_together
        whole = [encoder_length(encoder, shards, row) for row in range(12)]
        assert alone["length"].tolist() == whole and 0 in whole and max(whole) > 0

    @pytest.mark.parametrize(("words", "bytes_a_sample"), [(10, 4), (70_000, 8)])
    def test_take_half_the_memory_where_they_are_below_65536(
        self,
        tmp_path: Path,
        write_list: Callable,
        tokenizer: Tokenizer,
        words: int,
        bytes_a_sample: int,
    ) -> None:
        build_shards(write_list(A=[record("what", "yes " * words)]), tmp_path / "shards")
        shards = Shards(tmp_path / "shards")
        encoder = Encoder(tokenizer, chat_format("internlm2"), 4, 2048, cut=True)
        table, _ = lengths.token_lengths(shards, encoder)
        assert table.itemsize == bytes_a_sample
        assert table["length"].tolist() == [encoder_length(encoder, shards, 0)]

    def test_annotations_longer_than_the_first_read(
        self, tmp_path: Path, write_list: Callable, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build_shards(write_list(A=mixed_records(tmp_path, 6)), tmp_path / "shards")
        shards = Shards(tmp_path / "shards")
        expected = [(s.key, s.record) for s in map(shards.read, range(6))]
        for head in (10, 512, 600, 16_384):
            monkeypatch.setattr("megatron_gmai.data.shards.reader.HEAD", head)
            assert list(map(shards.read_record, range(6))) == expected


def encoder_length(encoder: Encoder, shards: Shards, row: int) -> int:
    stored = shards.read(row)
    try:
        return len(encoder.encode(stored.record, len(stored.images)).tokens)
    except BadSample:
        return 0
