"""Records that nobody would write by hand: each is stored or told, and none ends the build."""

import errno
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_gmai.data.ledger import Rejection, read_ledger
from megatron_gmai.data.shards import format as shard_format
from megatron_gmai.data.shards.build import build_shards
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.shards.units import slug
from tests.data.world import picture, record

HALF = "\ud800"  # of a surrogate pair: JSON can spell it, no encoding takes it


@pytest.fixture(scope="module")
def strange(
    tmp_path_factory: pytest.TempPathFactory, write_list_in: Callable[[Path], Callable]
) -> dict[str, Rejection]:
    """What the ledger says of each record, by its id."""
    folder = tmp_path_factory.mktemp("strange")
    picture().save(folder / "a.png")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe.png")
    records = [
        record("<image>", "yes", "a.png", id="good"),
        record("<image>", "yes", f"{HALF}.png", id="name"),
        record("<image>", "yes", "a.png", id="more", note=HALF),
        record("", "yes", id=HALF),
        record("<image>", "yes", "folder", id="folder"),
        record("<image>", "yes", "pipe.png", id="pipe"),
        record("<image>" * 70_000, "yes", ["a.png"] * 70_000, id="many"),
    ]
    manifest = build_shards(write_list_in(folder)(A=records), folder / "shards")
    assert (manifest.samples, manifest.rejected) == (1, 6)
    return {line.id: line for line in read_ledger(folder / "shards" / "rejected.jsonl")}


def test_half_a_surrogate_pair_is_told_wherever_it_stands(strange: dict[str, Rejection]) -> None:
    assert strange["name"].image == "\\ud800.png"
    assert "not valid Unicode" in strange["more"].reason
    assert "empty" in strange["\\ud800"].reason


def test_what_is_no_file_is_called_by_its_name(strange: dict[str, Rejection]) -> None:
    assert strange["folder"].reason.startswith("image folder: a folder, not a file, in ")
    assert strange["pipe"].reason.startswith("image pipe.png: a pipe or device, not a file")


def test_images_that_the_index_cannot_count_are_refused(strange: dict[str, Rejection]) -> None:
    assert strange["many"].reason == "70000 images, more than 65535"


def test_keys_numbers_and_names_that_look_right_and_are_not(tmp_path: Path) -> None:
    accent = "\u00e9.png"  # in one letter; the file has it in two, as macOS writes it
    picture().save(tmp_path / unicodedata.normalize("NFD", accent))
    texts = [
        json.dumps(record("<image>", "yes", accent)),
        '{"image": "a.png", "image": "b.png", ' + json.dumps(record("what", "yes"))[1:],
        '{"id": ' + "9" * 5000 + ", " + json.dumps(record("what", "yes"))[1:],
        json.dumps(record("what", "yes")),
    ]
    (tmp_path / "a.json").write_text(f"[{', '.join(texts)}]")
    (tmp_path / "LIST.json").write_text(
        json.dumps({"A": {"annotations": str(tmp_path / "a.json")}})
    )
    assert build_shards(tmp_path / "LIST.json", tmp_path / "shards").samples == 1
    ledger = read_ledger(tmp_path / "shards" / "rejected.jsonl")
    reasons = [line.reason for line in sorted(ledger, key=lambda line: line.record)]
    assert "; the file's name is there in Unicode's form NFD" in reasons[0]
    assert reasons[1] == "'image' stands twice" and "4300 digits" in reasons[2]


def test_a_sample_that_no_reader_takes_is_not_written(
    tmp_path: Path, write_list: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_format, "MAX_SAMPLE", 6000)
    picture(40, 30).save(tmp_path / "a.png")
    assert 2500 < (tmp_path / "a.png").stat().st_size < 5000
    records = [record("<image>" * n, "yes", ["a.png"] * n) for n in (1, 2)]
    build_shards(write_list(A=records), tmp_path / "shards")
    assert Shards(tmp_path / "shards").rows["images"].tolist() == [1]
    (line,) = read_ledger(tmp_path / "shards" / "rejected.jsonl")
    assert "more than 6000" in line.reason


def test_each_name_of_a_data_set_has_keys_of_its_own(tmp_path: Path, write_list: Callable) -> None:
    names = ["眼底", slug("眼底"), "A" * 90, "A" * 240]
    manifest = build_shards(
        write_list(**{name: [record("what", "yes")] for name in names}), tmp_path / "shards"
    )
    keys = [sample.key for sample in map(Shards(tmp_path / "shards").read, range(4))]
    assert len(set(keys)) == len({shard.name for shard in manifest.shards}) == 4
    assert np.all([source.samples == 1 for source in manifest.sources])


def test_an_image_that_may_be_read_again_gets_another_chance(
    tmp_path: Path, write_list: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        picture().save(tmp_path / name)
    list_file = write_list(A=[record("<image>", "yes", name) for name in ("a.png", "b.png")])
    (tmp_path / "a.png").chmod(0o000)  # tests may run as root, whom that does not stop
    open_file, look = os.open, os.lstat

    def refuse(call: Callable, closed: str) -> Callable:
        def refused(path: str, *rest: int, **more: int) -> object:
            if str(path).endswith(closed):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return call(path, *rest, **more)

        return refused

    with monkeypatch.context() as context:
        context.setattr(os, "open", refuse(open_file, "/a.png"))
        context.setattr(os, "lstat", refuse(look, "/b.png"))
        assert build_shards(list_file, tmp_path / "shards").rejected == 2
    lines = read_ledger(tmp_path / "shards" / "rejected.jsonl")
    assert {line.image: line.reason.split(": ")[1].split(" in ")[0] for line in lines} == {
        "a.png": "Permission denied",
        "b.png": "no permission to look for it",
    }
    (tmp_path / "a.png").chmod(0o644)
    assert build_shards(list_file, tmp_path / "shards").rejected == 0


def test_a_full_disk_is_told_with_its_folder(
    tmp_path: Path, write_list: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_format.ShardWriter, "add", full)
    with pytest.raises(ValueError, match="No space left on device in .*shards; .* goes on"):
        build_shards(write_list(A=[record("what", "yes")]), tmp_path / "shards")
