"""Mistakes in a list and in what it names: an error that helps, or done right."""

import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_gmai.data.ledger import read_ledger
from megatron_gmai.data.lock import LOCK_FILE
from megatron_gmai.data.shards.build import build_shards
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.sources import parquet
from megatron_gmai.data.sources.mixture import read_list
from tests.data.world import encoded, picture, record
from tools import inspect_shards, make_shards

GOOD = record("what", "yes")


def write(folder: Path, **changes: Any) -> Path:
    (folder / "a.json").write_text(json.dumps([GOOD]))
    entry = {"annotations": str(folder / "a.json"), **changes}
    (folder / "LIST.json").write_text(json.dumps({"A": entry}))
    return folder / "LIST.json"


def build(list_file: Path, **options: Any) -> tuple[Shards, list[str]]:
    lines: list[str] = []
    build_shards(list_file, list_file.parent / "shards", log=lines.append, **options)
    return Shards(list_file.parent / "shards"), lines


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    text = '{"A": {"annotations": "a.json"}, "A": {"annotations": "b.json"}}'
    (tmp_path / "LIST.json").write_text(text)
    with pytest.raises(ValueError, match="'A' stands twice"):
        read_list(tmp_path / "LIST.json")


def test_the_encoding_of_a_list_is_named(tmp_path: Path) -> None:
    text = json.dumps({"胸片": {"annotations": "a.json"}}, ensure_ascii=False) * 3
    (tmp_path / "LIST.json").write_text(text, encoding="gb18030")
    with pytest.raises(ValueError, match="LIST.json is GB18030"):
        read_list(tmp_path / "LIST.json")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("sampel_ratio", "sample_ratio"),
        ("length_cap", "length"),
        ("repeat_times", "repeat_time"),
        ("annotation", "annotations"),
        ("image_root", "image_dir"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(
    tmp_path: Path, key: str, near: str
) -> None:
    with pytest.raises(ValueError, match=f"unknown key {key!r}; did you mean {near!r}"):
        read_list(write(tmp_path, **{key: 1}))


def test_repeat_time_is_the_ratio(tmp_path: Path) -> None:
    (source,) = read_list(write(tmp_path, repeat_time=3))
    assert source.sample_ratio == 3.0
    with pytest.raises(ValueError, match="mean the same"):
        read_list(write(tmp_path, repeat_time=3, sample_ratio=1.0))


@pytest.mark.parametrize("length", [3, "1", True])
def test_a_wrong_length_is_told(tmp_path: Path, length: Any) -> None:
    if length == 3 and length is not True:
        _, lines = build(write(tmp_path, length=length))
        assert "A: 'length' is 3, found 1 records" in lines
    else:
        with pytest.raises(ValueError, match="'length' must be a number"):
            read_list(write(tmp_path, length=length))


@pytest.mark.parametrize("ratio", [0, 0.3])
def test_a_ratio_that_takes_no_sample_is_told(tmp_path: Path, ratio: float) -> None:
    _, lines = build(write(tmp_path, sample_ratio=ratio))
    assert f"A: a ratio of {ratio:g} takes none of 1 samples" in lines


@pytest.mark.parametrize("key", ["image", "images"])
def test_images_without_a_tag_are_no_text_sample(tmp_path: Path, key: str) -> None:
    list_file = write(tmp_path)
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps([GOOD, {**GOOD, key: ["a.png"]}]))
    shards, _ = build(list_file)
    assert len(shards) == 1
    (line,) = read_ledger(tmp_path / "shards" / "rejected.jsonl")
    assert "0 <image> in the text, but 1 image(s)" in line.reason


def test_image_and_images_that_differ_are_refused(tmp_path: Path) -> None:
    list_file = write(tmp_path)
    both = {**record("<image>what", "yes", "a.png"), "images": ["b.png"]}
    (tmp_path / "a.json").write_text(json.dumps([GOOD, both]))
    build(list_file)
    (line,) = read_ledger(tmp_path / "shards" / "rejected.jsonl")
    assert "'image' and 'images'" in line.reason


def test_folders_are_read_through_links_and_without_what_editors_leave(tmp_path: Path) -> None:
    for name in ("many", "many/.ipynb_checkpoints", "elsewhere"):
        (tmp_path / name).mkdir()
    for name in ("many/a.json", "many/.ipynb_checkpoints/a-checkpoint.json", "elsewhere/b.json"):
        (tmp_path / name).write_text(json.dumps([GOOD]))
    (tmp_path / "many" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "many")  # a ring
    (source,) = read_list(write(tmp_path, annotations=str(tmp_path / "many")))
    assert [file.name for file in source.annotation_files] == ["a.json", "b.json"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.json"])
def test_gzip_is_read_whatever_the_file_is_called(tmp_path: Path, name: str) -> None:
    text = "\n".join(json.dumps(record("what", f"yes {n}")) for n in range(3))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / name).write_bytes(gzip.compress(text.encode()))
    (tmp_path / "notes" / "plain.jsonl").write_text(json.dumps(GOOD))
    list_file = write(tmp_path, annotations=str(tmp_path / "notes"))
    shards, _ = build(list_file)
    assert len(shards) == 4
    assert any("reused" in line for line in build(list_file)[1])


def test_damaged_gzip_is_one_clear_message(tmp_path: Path) -> None:
    packed = gzip.compress(b"x" * 10_000)
    (tmp_path / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"cannot read annotations .*b\.jsonl\.gz"):
        build(write(tmp_path, annotations=str(tmp_path / "b.jsonl.gz")))


class TestImagesElsewhere:
    """Absolute names and links are taken where the user allows their folder, and nowhere else."""

    def sample(self, folder: Path, name: str, **entry: Any) -> Path:
        list_file = write(folder, **entry)
        (folder / "a.json").write_text(json.dumps([record("<image>what", "yes", name), GOOD]))
        return list_file

    @pytest.mark.parametrize("name", ["absolute", "link"])
    def test_need_the_flag_which_the_reason_names(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "store").mkdir()
        (tmp_path / "images").mkdir()
        file = tmp_path / "store" / "a.png"
        picture().save(file)
        (tmp_path / "images" / "link.png").symlink_to(file)
        given = str(file) if name == "absolute" else "link.png"
        list_file = self.sample(tmp_path, given, image_dir=str(tmp_path / "images"))
        shards, _ = build(list_file)
        (line,) = read_ledger(tmp_path / "shards" / "rejected.jsonl")
        assert len(shards) == 1 and "--image-root" in line.reason
        assert str(tmp_path / "store") in line.reason
        shards, lines = build(list_file, image_root=str(tmp_path / "store"))
        assert len(shards) == 2 and any("--image-root" in line for line in lines)

    def test_the_flag_allows_no_other_folder(self, tmp_path: Path) -> None:
        (tmp_path / "store").mkdir()
        (tmp_path / "images").mkdir()
        for place in (tmp_path / "stored.png", tmp_path / "store" / "a.png"):
            picture().save(place)
        list_file = self.sample(
            tmp_path, f"{tmp_path}/store/../stored.png", image_dir=str(tmp_path / "images")
        )
        shards, _ = build(list_file, image_root=str(tmp_path / "store"))
        assert len(shards) == 1

    def test_links_of_a_hugging_face_snapshot_lead_to_its_own_blobs(self, tmp_path: Path) -> None:
        snapshot = tmp_path / "datasets--x" / "snapshots" / "abc"
        (snapshot / "images").mkdir(parents=True)
        (tmp_path / "datasets--x" / "blobs").mkdir()
        (tmp_path / "datasets--x" / "blobs" / "1234").write_bytes(encoded(picture()))
        (snapshot / "images" / "a.png").symlink_to("../../../blobs/1234")
        picture().save(tmp_path / "secret.png")
        (snapshot / "images" / "b.png").symlink_to(tmp_path / "secret.png")
        list_file = self.sample(tmp_path, "images/a.png", image_dir=str(snapshot))
        shards, _ = build(list_file)
        assert len(shards) == 2
        list_file = self.sample(tmp_path, "images/b.png", image_dir=str(snapshot))
        shards, _ = build(list_file)
        assert len(shards) == 1


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "\ud800", "\u202eabc"])
def test_a_data_set_has_a_name_that_can_be_printed(tmp_path: Path, name: str) -> None:
    (tmp_path / "LIST.json").write_text(json.dumps({name: {"annotations": "a.json"}}))
    with pytest.raises(ValueError, match="printable") as error:
        read_list(tmp_path / "LIST.json")
    assert name.isprintable() or name not in str(error.value)


def test_an_image_folder_that_is_a_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"'image_dir' '.*a\.png' is no folder"):
        read_list(write(tmp_path, image_dir=str(tmp_path / "a.png")))


def test_a_pipe_among_annotations_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    os.mkfifo(tmp_path / "notes" / "b.json")
    with pytest.raises(ValueError, match=r"b\.json is no file"):
        read_list(write(tmp_path, annotations=str(tmp_path / "notes")))


def test_shards_below_the_annotations_are_none(tmp_path: Path) -> None:
    for folder in ("notes", "notes/shards"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "index.json").write_text("[]")
    (tmp_path / "notes/shards" / LOCK_FILE).touch()
    (source,) = read_list(write(tmp_path, annotations=str(tmp_path / "notes")))
    assert source.annotation_files == (tmp_path / "notes/index.json",)


def test_a_gzip_bomb_ends_where_annotations_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "LEAST_BOUND", 10_000)
    (tmp_path / "b.json").write_bytes(gzip.compress(bytes(1_000_000)))
    with pytest.raises(ValueError, match=r"b\.json unpack to more than \d+ bytes"):
        build(write(tmp_path, annotations=str(tmp_path / "b.json")))
    assert sum(file.stat().st_size for file in (tmp_path / "shards").rglob("*")) < 500_000


def test_annotations_without_a_record_are_mentioned(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text("[]")
    _, lines = build(write(tmp_path, annotations=str(tmp_path / "b.json")))
    assert "A: its annotations hold no records" in lines


def test_a_folder_of_annotations_that_cannot_be_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes" / "more").mkdir(parents=True)
    (tmp_path / "notes" / "a.json").write_text("[]")
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("more"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="cannot read .*notes/more: Permission denied"):
        read_list(write(tmp_path, annotations=str(tmp_path / "notes")))


def test_an_image_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--image-root .*nowhere is no folder"):
        build(write(tmp_path), image_root=str(tmp_path / "nowhere"))


def test_numbers_that_mean_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--datasets", str(write(tmp_path)), "--output", str(tmp_path / "out")]
    for main, wrong in (
        (make_shards.main, [*flags, "--workers", "-1"]),
        (inspect_shards.main, [str(tmp_path), "--image-size", "0"]),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "or more" in capsys.readouterr().err


def test_names_that_are_not_utf_8_are_recognised_again(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / os.fsdecode("胸片.json".encode("gb18030"))).write_text(json.dumps([GOOD, {}]))
    build(write(tmp_path, annotations=str(notes)))
    _, lines = build(write(tmp_path, annotations=str(notes)))
    assert "reused" in lines[0]
    assert len(read_ledger(tmp_path / "shards" / "rejected.jsonl")) == 1
