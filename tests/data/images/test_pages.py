"""Files of several pictures: the first or all of them, as `--tiff-pages` says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_gmai.config import DataConfig
from megatron_gmai.data.images import pages as pages_module
from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.images.pages import split_pages
from megatron_gmai.data.images.privacy import stored_image
from megatron_gmai.data.ledger import BadSample, read_ledger
from megatron_gmai.data.prepare import prepare_data
from megatron_gmai.data.shards.build import check_record
from megatron_gmai.data.shards.index import REJECTED_FILE
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.sources.mixture import Source
from tests.data.files import dicom
from tests.data.world import VISION, encoded, picture, record
from tools.make_shards import main

NAME = "DOE^JANE"
SLOPE = np.add.outer(np.arange(30), np.arange(40)).astype(np.int64)  # 0 to 68


def grey(mode: str, least: int, step: int) -> Image.Image:
    """A slope of grey values from `least` on."""
    kinds = {"L": "u1", "I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}
    values = (least + step * SLOPE).astype(kinds[mode])
    return Image.frombytes(mode, (40, 30), values.tobytes())


def stack(*images: Image.Image, **options: Any) -> bytes:
    first, *others = images
    return encoded(first, "TIFF", save_all=True, append_images=others, **options)


PAGES = {
    "8 bit": [grey("L", 5, 1), grey("L", 100, 2)],
    "16 bit": [grey("I;16", 1000, 500), grey("I;16", 100, 3)],
    "16 bit, big-endian": [grey("I;16B", 1000, 500), grey("I;16B", 100, 3)],
    "32 bit": [grey("I", -1000, 900), grey("I", 5, 1)],
    "float": [grey("F", 0, 1), grey("F", -40, 7)],
    "8 bit, then 16 bit": [grey("L", 5, 1), grey("I;16", 1000, 500)],
    "16 bit, then colours": [grey("I;16", 1000, 500), picture(40, 30)],
    "palette": [picture(40, 30, seed).convert("P") for seed in (0, 1)],
    "one bit": [grey("L", 100, 2).convert("1"), grey("L", 0, 3).convert("1")],
}


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_gives_the_pixels_of_a_file_of_its_own(kind: str) -> None:
    """So deep pages are windowed one by one, and those of 8 bits are left as they are."""
    split = split_pages(stack(*PAGES[kind]))
    assert len(split) == 2
    for page, image in zip(split, PAGES[kind], strict=True):
        assert np.array_equal(decode(page), decode(encoded(image, "TIFF")))


@pytest.mark.parametrize("kind", PAGES)
def test_the_first_page_is_the_same_taken_alone_and_with_the_others(kind: str) -> None:
    data = stack(*PAGES[kind])
    assert np.array_equal(decode(data), decode(split_pages(data)[0]))


def test_the_same_slope_looks_alike_in_8_and_16_bits() -> None:
    """The 16-bit one spreads over all levels by its window; the order of values is kept in both."""
    flat, deep = (decode(page)[:, :, 0].astype(int) for page in split_pages(
        stack(grey("L", 0, 3), grey("I;16", 0, 900))
    ))  # fmt: skip
    assert np.abs(flat * 255 / flat.max() - deep).max() <= 10
    for levels in (flat, deep):
        assert np.array_equal(np.argsort(levels[0]), np.arange(40))


def test_pages_keep_no_names() -> None:
    data = stack(*PAGES["16 bit"], tiffinfo={270: NAME})
    assert NAME.encode() in data
    assert not any(NAME.encode() in page for page in split_pages(data))


def test_a_big_tiff_has_pages_too() -> None:
    assert len(split_pages(stack(*PAGES["16 bit"], big_tiff=True))) == 2


def test_a_smaller_copy_is_no_page() -> None:
    copy = picture(20, 15)
    copy.encoderinfo = {"tiffinfo": {254: 1}}
    assert len(split_pages(stack(picture(40, 30), copy, picture(40, 30, 1)))) == 2


def test_other_files_and_single_pages_stay_as_they_are() -> None:
    for data in (encoded(picture(), "PNG"), encoded(picture(), "TIFF")):
        assert split_pages(data) == [data]


def test_a_circle_of_pages_ends() -> None:
    data = bytearray(stack(*PAGES["8 bit"]))
    first = int.from_bytes(data[4:8], "little")
    second = int.from_bytes(data[first + 2 + 12 * data[first] :][:4], "little")
    place = second + 2 + 12 * data[second]
    data[place : place + 4] = first.to_bytes(4, "little")
    assert len(split_pages(bytes(data))) == 2


def test_pages_may_not_exceed_all_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "MAX_PIXELS", 2000)
    with pytest.raises(BadSample, match="a TIFF whose pages exceed 2000 pixels"):
        split_pages(stack(*PAGES["8 bit"]))


def test_too_many_pages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "MAX_PAGES", 1)
    with pytest.raises(BadSample, match="a TIFF of 2 pages, more than 1"):
        split_pages(stack(*PAGES["8 bit"]))


FRAMES = [picture(40, 30, seed) for seed in (0, 1, 2)]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "DICOM"])
class TestAnimations:
    """Frames are pages, by the same flag."""

    def animation(self, kind: str) -> bytes:
        if kind == "DICOM":
            levels = np.stack([np.asarray(frame)[:, :, 0] for frame in FRAMES])
            return dicom(levels, NumberOfFrames=3, Rows=30, Columns=40)
        more = {"lossless": True} if kind == "WEBP" else {}
        return encoded(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:], **more)

    def check(self, folder: Path, kind: str, tiff_pages: str, text: str) -> list[np.ndarray]:
        (folder / "moving").write_bytes(self.animation(kind))
        source = Source("A", (), (folder,), tiff_pages=tiff_pages)
        _, files = check_record(record(text, "yes", "moving"), source)
        return [decode(data) for _, data in files]

    def test_the_first_frame_is_the_image(self, tmp_path: Path, kind: str) -> None:
        (image,) = self.check(tmp_path, kind, "first", "<image> what")
        assert np.array_equal(image, decode(self.animation(kind)))

    def test_a_shard_gets_no_other_frame(self, tmp_path: Path, kind: str) -> None:
        _, bare = stored_image(self.animation(kind))
        assert split_pages(bare) == [bare]

    def test_each_frame_is_an_image(self, tmp_path: Path, kind: str) -> None:
        for text in ("<image> what", "<image> <image> or <image>"):
            images = self.check(tmp_path, kind, "all", text)
            assert len(images) == 3
            different = [not np.array_equal(images[0], image) for image in images[1:]]
            assert all(different)
            if kind in ("WEBP", "PNG"):
                assert np.array_equal(images, [np.asarray(frame) for frame in FRAMES])

    def test_a_text_that_asks_for_all_is_refused(self, tmp_path: Path, kind: str) -> None:
        with pytest.raises(BadSample, match=r"for the 3 pages of 1 file.* --tiff-pages all"):
            self.check(tmp_path, kind, "first", "<image><image><image> what")


class TestTexts:
    """Which texts go with which pages."""

    def stored(
        self, folder: Path, tiff_pages: str, text: str, *names: str
    ) -> tuple[str, list[np.ndarray]]:
        """The human text in the shards, and the images."""
        (folder / "two.tif").write_bytes(stack(picture(seed=1), picture(seed=2)))
        picture(seed=3).save(folder / "one.png")
        source = Source("A", (), (folder,), tiff_pages=tiff_pages)
        given = record(text, "yes", list(names))
        kept, files = check_record(given, source)
        return kept["conversations"][0]["value"], [decode(data) for _, data in files]

    def pictures(self, *seeds: int) -> list[np.ndarray]:
        return [np.array(picture(seed=seed)) for seed in seeds]

    def test_first_takes_the_first_page(self, tmp_path: Path) -> None:
        text, images = self.stored(tmp_path, "first", "<image> what", "two.tif")
        assert text == "<image> what" and np.array_equal(images, self.pictures(1))

    def test_first_refuses_a_tag_for_each_page_and_names_the_flag(self, tmp_path: Path) -> None:
        with pytest.raises(BadSample, match=r"for the 2 pages of 1 file.* --tiff-pages all"):
            self.stored(tmp_path, "first", "<image><image> what", "two.tif")

    def test_all_takes_as_many_pages_as_tags(self, tmp_path: Path) -> None:
        text, images = self.stored(tmp_path, "all", "<image> and <image>", "two.tif")
        assert text == "<image> and <image>" and np.array_equal(images, self.pictures(1, 2))

    def test_all_repeats_the_tag_of_a_file_for_its_pages(self, tmp_path: Path) -> None:
        text, images = self.stored(
            tmp_path, "all", "Is <image> like <image>?", "two.tif", "one.png"
        )
        assert text == "Is <image><image> like <image>?"
        assert np.array_equal(images, self.pictures(1, 2, 3))

    @pytest.mark.parametrize("tiff_pages", ["first", "all"])
    def test_any_other_number_of_tags_is_refused(self, tmp_path: Path, tiff_pages: str) -> None:
        with pytest.raises(BadSample, match=r"3 <image> in the text, but \d image"):
            self.stored(tmp_path, tiff_pages, "<image><image><image> what", "two.tif")

    def test_a_damaged_page_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "cut.tif").write_bytes(stack(picture(), picture(seed=1))[:-400])
        source = Source("A", (), (tmp_path,), tiff_pages="all")
        with pytest.raises(BadSample):
            check_record(record("<image> what", "yes", "cut.tif"), source)


class TestFlag:
    @pytest.fixture
    def list_file(self, tmp_path: Path, write_list: Callable) -> Path:
        (tmp_path / "two.tif").write_bytes(stack(*PAGES["16 bit"]))
        both = [record(text, "yes", "two.tif") for text in ("<image> a", "<image><image> b")]
        return write_list(A=both)

    @pytest.mark.parametrize(("flags", "images"), [((), [1]), (("--tiff-pages", "all"), [2, 2])])
    def test_of_make_shards(
        self, list_file: Path, tmp_path: Path, flags: tuple[str, ...], images: list[int]
    ) -> None:
        shards = tmp_path / "shards"
        arguments = ["--datasets", str(list_file), "--output", str(shards), "--workers", "0"]
        assert main([*arguments, *flags]) == 0
        assert Shards(shards).rows["images"].tolist() == images
        assert len(read_ledger(shards / REJECTED_FILE)) == 2 - len(images)

    def test_of_the_trainer(self, list_file: Path, tokenizer_file: Path, tmp_path: Path) -> None:
        data = DataConfig(datasets=str(list_file), tokenizer=str(tokenizer_file), tiff_pages="all")
        data = prepare_data(data, VISION, tmp_path / "shards")
        assert Shards(str(data.shards)).rows["images"].tolist() == [2, 2]

    def test_shards_of_the_other_choice_are_made_anew(
        self, list_file: Path, tmp_path: Path
    ) -> None:
        arguments = ["--datasets", str(list_file), "--output", str(tmp_path / "shards")]
        assert main([*arguments, "--workers", "0"]) == 0
        assert main([*arguments, "--workers", "0", "--tiff-pages", "all"]) == 0
        assert Shards(tmp_path / "shards").rows["images"].tolist() == [2, 2]

    def test_does_not_go_with_the_shards_of_others(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit):
            main(["--index", str(tmp_path), "--tiff-pages", "all"])
