"""Shards of other tools: indexed where they lie, and trained on."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import webdataset

from megatron_gmai.config import DataConfig
from megatron_gmai.data.ledger import read_ledger
from megatron_gmai.data.loading.dataset import open_dataset
from megatron_gmai.data.loading.loader import iterate
from megatron_gmai.data.lock import LOCK_FILE
from megatron_gmai.data.shards.foreign import index_shards
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.text.tokenizer import load_tokenizer
from tests.data.world import VISION, encoded, picture, record
from tools.make_shards import main

CAPTION = "a scan of the left lung"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards by WebDataset's own writer: conversations, and img2dataset's captions."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "a.tar")) as writer:
        for i in range(4):
            turns = record("<image><image> what", "yes")
            files = {"0.png": encoded(picture(seed=i)), "1.png": encoded(picture(seed=9))}
            writer.write({"__key__": f"deep/{'long' * 30}{i}", "json": turns, **files})
    with webdataset.TarWriter(str(folder / "b.tar")) as writer:
        for i in range(3):
            meta = {"url": "somewhere", "width": 20}
            image = encoded(picture(seed=i), "JPEG")
            writer.write({"__key__": f"{i:09d}", "jpg": image, "txt": CAPTION, "json": meta})
    return folder


def test_samples_are_found_with_images_in_order(folder: Path) -> None:
    assert index_shards(folder).samples == 7
    shards = Shards(folder)
    first = shards.read(0)
    assert first.images == (encoded(picture(seed=0)), encoded(picture(seed=9)))
    caption = shards.read(4)
    assert [turn["value"] for turn in caption.record["conversations"]] == [
        "<image>\nDescribe this image.",
        CAPTION,
    ]


def test_they_can_be_trained_on(folder: Path, tokenizer_file: Path) -> None:
    assert main(["--index", str(folder), "--tokenizer", str(tokenizer_file)]) == 0
    data = DataConfig(shards=str(folder), max_length=128)
    dataset = open_dataset(data, load_tokenizer(tokenizer_file), VISION, 1, None)
    batches = list(iterate(dataset, 0, 1, 1, 1, total_packs=dataset.total_packs(1)))
    assert sum(batch.num_samples for batch in batches) == 7
    assert sum(len(batch.pixel_values) for batch in batches) == 4 * 2 + 3


def test_packed_tar_files_are_not_passed_over_in_silence(folder: Path) -> None:
    (folder / "c.tar.gz").write_bytes(b"")
    lines: list[str] = []
    index_shards(folder, log=lines.append)
    assert lines == [f"{folder}: 1 file(s) passed over, as c.tar.gz: unpack them to .tar"]


def test_a_second_run_finds_the_index_and_other_files_are_noticed(folder: Path) -> None:
    assert index_shards(folder) == index_shards(folder)
    (folder / "b.tar").unlink()
    with pytest.raises(ValueError, match="index of other files"):
        index_shards(folder)


def test_links_devices_and_leaving_names_are_refused(tmp_path: Path) -> None:
    turns = json.dumps(record("what", "yes")).encode()
    kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("good", "../up", "/absolute"):
            member = tarfile.TarInfo(f"{name}.json")
            member.size = len(turns)
            archive.addfile(member, io.BytesIO(turns))
        for name, kind in kinds.items():
            member = tarfile.TarInfo(f"{name}.json")
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member)
    manifest = index_shards(tmp_path)
    assert (manifest.samples, manifest.rejected) == (1, 5)
    reasons = [line.reason for line in read_ledger(tmp_path / "rejected.jsonl")]
    assert sum("link or a device" in reason for reason in reasons) == 3
    assert sum("leaves its folder" in reason for reason in reasons) == 2


def test_what_is_named_like_a_tar_file_and_is_none_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(folder / "\x1b[2J.tar")
    assert main(["--index", str(folder)]) == 2
    assert r"\x1b[2J.tar is no file" in capsys.readouterr().err
    (folder / "\x1b[2J.tar").unlink()
    for plant in (os.mkfifo, Path.mkdir, lambda at: at.symlink_to("/dev/zero")):
        plant(folder / "x.tar")
        with pytest.raises(ValueError, match=r"x\.tar is no file"):
            index_shards(folder)
        (folder / "x.tar").rename(folder / f"x{len(list(folder.iterdir()))}")
    (folder / "index.partial.npy").symlink_to(folder / "mine")
    index_shards(folder)
    assert not (folder / "mine").exists()


def test_a_complete_folder_that_cannot_be_written_to_is_used_as_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_file: Path
) -> None:
    notes = tmp_path / "a.json"
    notes.write_text(json.dumps([record("what", "yes")]))
    (tmp_path / "LIST.json").write_text(json.dumps({"A": {"annotations": str(notes)}}))
    built = ["--datasets", str(tmp_path / "LIST.json"), "--output", str(tmp_path / "built")]
    commands = [["--index", str(folder)], [*built, "--tokenizer", str(tokenizer_file)]]
    for command in commands:
        assert main(command) == 0
    folders = (folder, tmp_path / "built")
    for place in folders:
        (place / LOCK_FILE).unlink()
    before = [sorted((f, f.stat().st_mtime_ns) for f in place.iterdir()) for place in folders]
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in folders)
    assert [main(command) for command in commands] == [0, 0]
    notes.write_text(json.dumps([record("what", "no")]))
    assert main(built) == 2
    assert before == [sorted((f, f.stat().st_mtime_ns) for f in at.iterdir()) for at in folders]


def test_a_folder_without_tar_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no .tar files"):
        index_shards(tmp_path)


def test_a_caption_in_another_encoding_is_refused(tmp_path: Path) -> None:
    captions = {"good": "左肺 lung".encode("utf-8-sig"), "bad": "左肺".encode("gb18030")}
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for key, caption in captions.items():
            writer.write({"__key__": key, "png": encoded(picture()), "txt": caption})
    assert index_shards(tmp_path).samples == 1
    (line,) = read_ledger(tmp_path / "rejected.jsonl")
    assert line.id == "bad" and "the caption is not UTF-8" in line.reason
    assert Shards(tmp_path).read(0).record["conversations"][1]["value"] == "左肺 lung"


@pytest.mark.parametrize("name", ["image", "images", "img"])
def test_an_annotation_without_its_image_is_refused(tmp_path: Path, name: str) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "lost", "json": record("what", "yes", **{name: ["a.png"]})})
        writer.write({"__key__": "text", "json": record("what", "yes", **{name: None})})
    assert index_shards(tmp_path).samples == 1
    (line,) = read_ledger(tmp_path / "rejected.jsonl")
    assert line.id == "lost" and "image" in line.reason
