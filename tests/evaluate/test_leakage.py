"""Benchmark images among training images: the same, saved again, scaled; and others are not."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_gmai.data.shards.format import ShardWriter
from megatron_gmai.data.shards.index import (
    Manifest,
    ShardFile,
    SourceInfo,
    read_manifest,
    save_index,
    write_manifest,
)
from megatron_gmai.evaluate.benchmarks.table import read_benchmark
from megatron_gmai.evaluate.leakage.check import DISTANCE, find_leaks
from megatron_gmai.evaluate.leakage.compare import MOST_DISTANCE, Finder
from megatron_gmai.evaluate.leakage.hashes import HASHED, UNREADABLE, hash_image, hashes_of_shards
from tests.evaluate.tables import cell, encoded, png, write_tsv


def silent(done: int, total: int) -> None:
    pass


def make_shards(folder: Path, samples: list[list[bytes]]) -> Path:
    folder.mkdir(parents=True)
    writer = ShardWriter(folder / "0.tar")
    for number, images in enumerate(samples):
        turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
        writer.add(f"set/{number}", {"conversations": turns}, [("png", data) for data in images])
    rows = writer.close()
    save_index(folder, rows)
    size = (folder / "0.tar").stat().st_size
    source = SourceInfo("set", 1.0, False, len(samples), 0)
    write_manifest(folder, Manifest((ShardFile("0.tar", len(samples), size),), (source,), "x"))
    return folder


def changed(data: bytes, how: str) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if how == "jpeg":
        return encoded(image, "JPEG", quality=85)
    if how == "half":
        return encoded(
            image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        )
    if how == "brighter":
        return encoded(image.point(lambda level: min(255, round(level * 0.8 + 25))))
    return encoded(image, "PNG", compress_level=0)


def test_images_are_found_again_and_named(tmp_path: Path) -> None:
    training = [[png(1, 192)], [png(2, 192), png(3, 192)], [], [png(4, 192)], [b"broken"]]
    shards = make_shards(tmp_path / "shards", training)
    images = [
        changed(png(1, 192), "bytes"),
        changed(png(3, 192), "jpeg"),
        changed(png(4, 192), "half"),
        changed(png(2, 192), "brighter"),
        png(5, 192),
        png(6, 192),
    ]
    rows = [{"index": i, "image": cell(data), "question": "q"} for i, data in enumerate(images)]
    rows += [
        {"index": 6, "image": "0", "question": "q"},
        {"index": 7, "image": cell(b"x" * 60), "question": "q"},
    ]
    benchmark = read_benchmark(write_tsv(tmp_path / "Set.tsv", rows))
    leaks = find_leaks(benchmark, shards, tmp_path / "hashes", DISTANCE, silent)
    assert leaks.indices == {"0", "1", "2", "3", "6"}
    assert (leaks.images, leaks.unreadable_images) == (6, 1)
    assert (leaks.training_images, leaks.unreadable_training_samples) == (4, 1)
    found = {match["indices"][0]: match for match in leaks.matches}
    assert found["0"]["exact"] and found["0"]["indices"] == ["0", "6"]
    assert not found["1"]["exact"] and found["1"]["distance"] <= DISTANCE
    keys = {i: (m["training_key"], m["training_image"]) for i, m in found.items()}
    assert keys == {
        "0": ("set/0", 0),
        "1": ("set/1", 1),
        "2": ("set/3", 0),
        "3": ("set/1", 0),
    }
    assert (
        "4 of 6 images of Set are among 4 training images: 1 with equal pixels" in leaks.to_text()
    )


def test_hashes_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards(tmp_path / "shards", [[png(i)] for i in range(3)])
    first = np.array(hashes_of_shards(shards, None, silent))
    monkeypatch.setattr("megatron_gmai.evaluate.leakage.hashes._parts", None)
    assert (np.array(hashes_of_shards(shards, None, silent)) == first).all()
    assert len(first) == 3 and first.dtype == HASHED


def test_different_pictures_are_far_apart() -> None:
    looks = [hash_image(png(seed, 192))[1] for seed in range(30)]
    distances = [int(np.bitwise_count(a ^ b).sum()) for i, a in enumerate(looks) for b in looks[:i]]
    assert min(distances) > 4 * DISTANCE


class TestFinder:
    def hashes(self, count: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        hashes = np.zeros(count, HASHED)
        hashes["looks"] = rng.integers(0, 2**64, (count, 4), dtype=np.uint64)
        hashes["exact"] = rng.integers(0, 2**64, (count, 2), dtype=np.uint64)
        return hashes

    def flipped(self, looks: np.ndarray, bits: int, seed: int) -> np.ndarray:
        flipped = looks.copy()
        for bit in np.random.default_rng(seed).choice(256, bits, replace=False):
            flipped[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
        return flipped

    @pytest.mark.parametrize("most", [0, 3, MOST_DISTANCE])
    def test_it_finds_what_comparing_every_pair_finds(
        self, most: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("megatron_gmai.evaluate.leakage.compare._BLOCK", 100)
        monkeypatch.setattr("megatron_gmai.evaluate.leakage.compare._PAIRS", 7)
        training, mine = self.hashes(350, 1), self.hashes(40, 2)
        for i in range(30):
            mine["looks"][i] = self.flipped(training["looks"][i * 9], i % 20, i)
            if i % 20 == 0:
                mine["exact"][i] = training["exact"][i * 9]
        training["looks"][300:310] = training["looks"][0]
        near = Finder(mine["exact"], mine["looks"], most).find(training)
        bits = np.bitwise_count(mine["looks"][:, None] ^ training["looks"][None]).sum(axis=2)
        for i in range(40):
            close = np.flatnonzero(bits[i] <= most)
            assert (i in near) == bool(len(close))
            if len(close):
                assert near[i].count == len(close)
                assert near[i].distance == bits[i].min()
                assert near[i].training == int(bits[i].argmin())
                assert near[i].exact == (i % 20 == 0)

    def test_a_crowd_of_equal_images_is_counted_in_pieces(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        training, mine = self.hashes(1000, 1), self.hashes(100, 2)
        training["looks"], mine["looks"] = 0, 0
        monkeypatch.setattr("megatron_gmai.evaluate.leakage.compare._PAIRS", 30_000)
        near = Finder(mine["exact"], mine["looks"], 12).find(training)
        assert len(near) == 100 and {one.count for one in near.values()} == {1000}

    def test_unreadable_images_match_nothing(self) -> None:
        training, mine = self.hashes(10, 1), self.hashes(1, 2)
        mine["looks"] = 0
        training["looks"][3], training["image"][3] = 0, UNREADABLE
        assert Finder(mine["exact"], mine["looks"], 12).find(training) == {}

    @pytest.mark.parametrize("most", [-1, MOST_DISTANCE + 1])
    def test_a_distance_that_cannot_be_searched_is_refused(self, most: int) -> None:
        mine = self.hashes(1, 1)
        with pytest.raises(ValueError, match="must be from 0 to 15"):
            Finder(mine["exact"], mine["looks"], most)


def test_shards_of_another_content_get_other_hashes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        folder = make_shards(tmp_path / name, [[png(seed)]])
        write_manifest(folder, dataclasses.replace(read_manifest(folder), inputs=name))
        hashes_of_shards(folder, tmp_path / "hashes", silent)
    assert len(list((tmp_path / "hashes").iterdir())) == 2
