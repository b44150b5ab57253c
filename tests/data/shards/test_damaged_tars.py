"""Tar files of others, damaged or odd: what is lost is said, and nothing is trained on by half."""

import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from megatron_gmai.data.inspection.rejected import Evidence, Finder
from megatron_gmai.data.ledger import BadSample, Rejection, read_ledger
from megatron_gmai.data.shards.foreign import index_shards
from megatron_gmai.data.shards.format import parse_sample, tar_members
from megatron_gmai.data.shards.index import MANIFEST_FILE
from megatron_gmai.data.shards.reader import Shards
from tests.data.world import encoded, picture, record

PICTURE = encoded(picture())
TURNS = json.dumps(record("<image>what", "yes")).encode()


def tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
    numbers = range(first, first + count)
    return [m for n in numbers for m in ((f"{n}.json", TURNS), (f"{n}.png", PICTURE))]


WHOLE = tar(samples(0, 4))
HEADERS = [WHOLE.find(f"{n}.json".encode()) for n in range(4)]


def index(folder: Path, content: bytes) -> tuple[int, list[Rejection]]:
    (folder / "a.tar").write_bytes(content)
    manifest = index_shards(folder)
    ledger = read_ledger(folder / "rejected.jsonl")
    assert manifest.rejected == len(ledger)
    return manifest.samples, ledger


def test_a_whole_file_has_nothing_to_tell(tmp_path: Path) -> None:
    assert index(tmp_path, WHOLE) == (4, [])


@pytest.mark.parametrize("end", [1024, 512])
def test_an_end_mark_without_padding_is_whole(tmp_path: Path, end: int) -> None:
    content = WHOLE.rstrip(b"\0")
    content += bytes(-len(content) % 512 + end)
    assert index(tmp_path, content) == (4, [])


DAMAGES = {
    "cut in a picture": (WHOLE[: HEADERS[2] + 1600], 2, "ends inside of the sample|is cut"),
    "cut in a header": (WHOLE[: HEADERS[2] + 100], 2, r"damaged at byte"),
    "cut between samples": (WHOLE[: HEADERS[2]], 2, "no end mark"),
    "bad header": (WHOLE[: HEADERS[2]] + b"x" * 512 + WHOLE[HEADERS[2] + 512 :], 2, "damaged at"),
    "zeroed header": (
        WHOLE[: HEADERS[2]] + bytes(512) + WHOLE[HEADERS[2] + 512 :],
        2,
        "goes on behind its end mark",
    ),
    "two joined": (WHOLE + tar(samples(4, 2)), 4, "goes on behind its end mark"),
    "trailing rubbish": (WHOLE + b"rubbish", 4, "goes on behind its end mark"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_lost_is_in_the_ledger(tmp_path: Path, name: str) -> None:
    content, usable, reason = DAMAGES[name]
    found, ledger = index(tmp_path, content)
    assert found == usable
    assert ledger and all(line.key.startswith("a.tar@") for line in ledger)
    assert any(re.search(reason, line.reason) for line in ledger), ledger


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("k.dcm", b"junk"),
        ("k.jp2", b"junk"),
        ("k.avif", b"junk"),
        ("k.nii.gz", b"junk"),
        ("k.HEIC", b"junk"),
        ("k.mp4", b"junk"),
        ("", b""),
    ],
)
def test_a_caption_is_never_trained_without_its_image(
    tmp_path: Path, name: str, data: bytes
) -> None:
    members = [("k.txt", b"a scan of the lung"), *([(name, data)] if name else [])]
    found, (line,) = index(tmp_path, tar([*members, *samples(0, 1)]))
    assert found == 1 and line.id == "k"
    assert "without an image" in line.reason or "image 0" in line.reason


def test_images_of_every_readable_kind_are_taken(tmp_path: Path) -> None:
    kinds = {"webp": "WEBP", "bmp": "BMP", "ppm": "PPM", "jp2": "JPEG2000", "jfif": "JPEG"}
    members = []
    for suffix, kind in kinds.items():
        members += [(f"{suffix}.{suffix}", encoded(picture(), kind)), (f"{suffix}.txt", b"a lung")]
    assert index(tmp_path, tar(members)) == (5, [])
    shards = Shards(tmp_path)
    assert all(len(shards.read(row).images) == 1 for row in range(5))


BAD = {
    "a tag too many": record("<image><image>what", "yes"),
    "no tag": record("what", "yes"),
    "no answer": {"conversations": [{"from": "human", "value": "<image>what"}]},
    "unknown speaker": {"conversations": [{"from": "bot", "value": "<image>what"}]},
}


@pytest.mark.parametrize("name", BAD)
def test_annotations_are_checked_as_those_of_a_list_are(tmp_path: Path, name: str) -> None:
    members = [("k.json", json.dumps(BAD[name]).encode()), ("k.png", PICTURE)]
    found, (line,) = index(tmp_path, tar([*members, *samples(0, 2)]))
    assert found == 2 and line.id == "k"


def test_a_key_that_comes_again_is_rejected_and_each_line_counts(tmp_path: Path) -> None:
    found, ledger = index(tmp_path, tar([*samples(0, 2), *samples(0, 2), *samples(0, 1)]))
    assert found == 2 and len(ledger) == 3
    assert len({line.key for line in ledger}) == 3
    assert all("earlier sample" in line.reason for line in ledger)


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    folders = [tmp_path / "alone", tmp_path / "many"]
    for folder in folders:
        folder.mkdir()
        for number, (content, _, _) in enumerate(DAMAGES.values()):
            (folder / f"{number}.tar").write_bytes(content)
    one, two = (
        index_shards(folder, workers) for folder, workers in zip(folders, (0, 2), strict=True)
    )
    assert one.shards == two.shards
    lines = [
        [(line.key, line.reason) for line in read_ledger(folder / "rejected.jsonl")]
        for folder in folders
    ]
    assert lines[0] == lines[1] and (folders[0] / MANIFEST_FILE).exists()


class TestSparseMembers:
    """A few bytes that stand for any number of zeros."""

    SIZE = 2**26

    def content(self, **more: str) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            sparse = tarfile.TarInfo("s.txt")
            sparse.size = 512
            sparse.pax_headers = {"GNU.sparse.size": str(self.SIZE), "GNU.sparse.map": "0,512"}
            archive.addfile(sparse, io.BytesIO(bytes(512)))
            picture = tarfile.TarInfo("s.png")
            picture.size = len(PICTURE)
            archive.addfile(picture, io.BytesIO(PICTURE))
        return buffer.getvalue()

    def test_are_refused_unread(self, tmp_path: Path) -> None:
        found, (line,) = index(tmp_path, self.content())
        assert found == 0 and "'s.txt' is a sparse file" in line.reason

    def test_what_follows_the_last_one_is_not_taken_for_lost(self, tmp_path: Path) -> None:
        content = self.content()
        cut = content[: content.index(b"s.png")] + bytes(1024)
        found, lines = index(tmp_path, cut)
        assert found == 0 and ["sparse" in line.reason for line in lines] == [True]

    def test_are_not_filled_up_where_a_sample_is_read(self) -> None:
        with pytest.raises(BadSample, match="'s.txt' is not stored whole"):
            parse_sample(self.content())

    def test_are_not_shown(self, tmp_path: Path) -> None:
        sample = tar(samples(0, 1)).rstrip(b"\0")
        sample += bytes(-len(sample) % 512)
        _, (line,) = index(tmp_path, sample + self.content())
        assert Finder(Shards(tmp_path)).look(line) == Evidence()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with any size, also one that `tarfile` would not write."""
    member = tarfile.TarInfo(name)
    member.type = kind
    raw = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    raw[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


LONG_NAME = header("././@LongLink", 4, tarfile.GNUTYPE_LONGNAME) + b"abc\0".ljust(512, b"\0")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (header("b.json", -512), "a member of -512 bytes"),  # leads back to itself, for ever
        (header("b.json", -5000), "a member of -5000 bytes"),
        (LONG_NAME * 2000, "recursion"),
    ],
)
def test_headers_that_lead_nowhere_end_the_file(tmp_path: Path, damage: bytes, told: str) -> None:
    good = json.dumps(record("what", "yes")).encode()
    count, (line,) = index(tmp_path, header("a.json", len(good)) + good.ljust(512, b"\0") + damage)
    assert count == 1 and "damaged at byte 1024" in line.reason and told in line.reason
    with pytest.raises(BadSample):
        list(tar_members(damage))
    assert Finder(Shards(tmp_path)).look(Rejection("a.tar@1024", "A", "", id="b")) == Evidence()


def test_what_other_systems_put_into_tar_files(tmp_path: Path) -> None:
    """macOS puts a resource fork before each member, Windows writes endings in capitals."""
    members = [
        *(("._k.json", b"\0\5\x16\7"), ("k.json", TURNS), ("._k.png", b"\0\5"), ("k.png", PICTURE)),
        *(("w.JSON", TURNS), ("w.PNG", PICTURE), ("t.TXT", b"a scan"), ("t.JPG", PICTURE)),
    ]
    assert index(tmp_path, tar(members)) == (3, [])
    shards = Shards(tmp_path)
    assert [len(shards.read(row).images) for row in range(3)] == [1, 1, 1]
    assert shards.read_record(1)[1] == json.loads(TURNS)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("k.json", TURNS), ("k.json", TURNS), ("k.png", PICTURE)], "'k.json' stands twice"),
        ([("k.txt", b"one"), ("k.txt", b"two"), ("k.png", PICTURE)], "'k.txt' stands twice"),
        ([("k.txt", bytes(16 * 2**20 + 1)), ("k.png", PICTURE)], "of more than 16777216 bytes"),
        ([("k.json", b'{"id": 1, "id": 2,' + TURNS[1:]), ("k.png", PICTURE)], "'id' stands twice"),
    ],
)
def test_texts_that_stand_twice_or_are_too_long_are_told(
    tmp_path: Path, members: list[tuple[str, bytes]], reason: str
) -> None:
    count, (line,) = index(tmp_path, tar([*members, *samples(0, 1)]))
    assert count == 1 and reason in line.reason
