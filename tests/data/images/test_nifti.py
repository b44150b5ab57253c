"""Volumes: which slices are images, how they lie, what is refused."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from megatron_gmai.data.images import formats, nifti, pages
from megatron_gmai.data.images.decode import decode, decode_slices
from megatron_gmai.data.ledger import BadSample, read_ledger
from megatron_gmai.data.shards.build import build_shards, check_record
from megatron_gmai.data.shards.index import REJECTED_FILE
from megatron_gmai.data.shards.reader import Shards
from megatron_gmai.data.sources.mixture import Source
from tests.data.world import record

# Brighter to the right, far brighter to the front, brightest to the head.
SHAPE = (6, 8, 10)
RIGHT, FRONT, HEAD = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")
VOLUME = (RIGHT + 100 * FRONT + 10_000 * HEAD).astype(np.int32)


def volume(
    values: np.ndarray = VOLUME, affine: Any = None, kind: Any = None, **header: Any
) -> bytes:
    image = (kind or nibabel.Nifti1Image)(values, np.eye(4) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    return image.to_bytes()


def one(data: bytes, rule: str) -> np.ndarray:
    (levels,) = decode_slices(data, rule)
    return levels.astype(int)


class TestView:
    """Slices lie as radiologists view them."""

    def test_axial_front_at_the_top_and_right_at_the_left(self) -> None:
        levels = one(volume(), "axial")
        assert levels.shape == (8, 6)
        assert (np.diff(levels, axis=0) < 0).all() and (np.diff(levels, axis=1) <= 0).all()

    def test_coronal_head_at_the_top_and_right_at_the_left(self) -> None:
        levels = one(volume(), "coronal")
        assert levels.shape == (10, 6)
        assert (np.diff(levels, axis=0) < 0).all() and (np.diff(levels, axis=1) <= 0).all()

    def test_sagittal_head_at_the_top_and_front_at_the_left(self) -> None:
        levels = one(volume(), "sagittal")
        assert levels.shape == (10, 8)
        assert (np.diff(levels, axis=0) < 0).all() and (np.diff(levels, axis=1) <= 0).all()

    @pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
    @pytest.mark.parametrize("codes", ["LAS", "LPS", "SRA", "ASR", "PIL", "IPR"])
    def test_however_the_volume_is_stored(self, codes: str, axis: str) -> None:
        """The affine says where the axes run; the view is the same."""
        turns = nibabel.orientations.axcodes2ornt(codes)
        to_ras = nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt("RAS"), turns
        )
        stored = nibabel.Nifti1Image(VOLUME, np.eye(4)).as_reoriented(to_ras)
        assert "".join(nibabel.aff2axcodes(stored.affine)) == codes
        for rule in (axis, f"{axis}:@1", f"{axis}:2"):
            found = list(decode_slices(stored.to_bytes(), rule))
            assert np.array_equal(found, list(decode_slices(volume(), rule)))

    def test_pixels_are_square(self) -> None:
        levels = one(volume(affine=np.diag([1, 1, 3, 1])), "coronal")
        assert levels.shape == (30, 6)
        assert one(volume(affine=np.diag([2, 1, 3, 1])), "axial").shape == (8, 12)


class TestRule:
    def numbers(self, rule: str) -> list[int]:
        """Which slices were taken: each is as bright as its number."""
        values = np.zeros(SHAPE, dtype=np.uint8)
        values[:, :, :] = 10 * np.arange(10)
        values[0, 0], values[5, 7] = 0, 100  # so that all slices have one range
        found = decode_slices(volume(values, cal_min=0, cal_max=100), rule)
        return [round(float(np.median(levels)) / 25.5) for levels in found]

    @pytest.mark.parametrize(
        ("rule", "taken"),
        [
            ("axial", [5]),
            ("axial:1", [5]),
            ("axial:2", [2, 7]),
            ("axial:5", [1, 3, 5, 7, 9]),
            ("axial:@0", [0]),
            ("axial:@9", [9]),
            ("axial:all", list(range(10))),
        ],
    )
    def test_takes_these_slices(self, rule: str, taken: list[int]) -> None:
        assert self.numbers(rule) == taken

    @pytest.mark.parametrize("rule", ["", "middle", "axial:0", "axial:-1", "axial:@", 3, ["axial"]])
    def test_other_rules_are_refused_with_an_example(self, rule: Any) -> None:
        with pytest.raises(BadSample, match='write "nifti_slices": "axial"'):
            list(decode_slices(volume(), rule))

    def test_slices_that_are_not_there(self) -> None:
        for rule in ("axial:@10", "axial:11"):
            with pytest.raises(BadSample, match="of a volume of 10"):
                list(decode_slices(volume(), rule))

    def test_without_a_rule_a_volume_has_no_image(self) -> None:
        with pytest.raises(BadSample, match="say which slices"):
            decode(volume())


class TestFiles:
    def test_packed_and_of_the_second_version(self) -> None:
        expected = one(volume(), "axial")
        assert np.array_equal(one(gzip.compress(volume()), "axial"), expected)
        assert np.array_equal(one(volume(kind=nibabel.Nifti2Image), "axial"), expected)
        assert np.array_equal(one(volume(VOLUME.astype(">i4")), "axial"), expected)
        assert np.array_equal(one(volume(VOLUME[..., None]), "axial"), expected)

    def test_the_range_for_display_is_the_window(self) -> None:
        levels = one(volume(cal_min=0, cal_max=1000), "axial:@0")
        assert levels.max() == 255 and levels.min() == 0
        assert np.ptp(one(volume(cal_min=0, cal_max=70_000), "axial:@0")) == 255

    def test_bad_volumes_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for data, reason in [
            (volume(np.zeros((4, 4, 4, 3), np.float32)), "shape 4 x 4 x 4 x 3, not one volume"),
            (volume(np.zeros((4, 4), np.float32)), "not one volume"),
            (volume(np.zeros((4, 4, 4), np.complex64)), "complex64"),
            (volume()[:-40], "NIfTI"),
            (gzip.compress(volume())[:-100], "NIfTI"),
        ]:
            with pytest.raises(BadSample, match=reason):
                list(decode_slices(data, "axial:all"))
        monkeypatch.setattr(formats, "MAX_VOLUME", 1000)
        with pytest.raises(BadSample, match="unpacks to more than 1000 bytes"):
            list(decode_slices(gzip.compress(volume()), "axial"))

    def test_without_nibabel_the_reason_names_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
        with pytest.raises(BadSample, match=r"nibabel: pip install 'megatron-gmai\[nifti\]'"):
            list(decode_slices(volume(), "axial"))


class TestRecords:
    def stored(self, folder: Path, text: str, rule: str | None, **more: Any) -> tuple[str, int]:
        (folder / "scan.nii.gz").write_bytes(gzip.compress(volume()))
        source = Source("A", (), (folder,), nifti_slices=rule)
        kept, files = check_record(record(text, "yes", "scan.nii.gz", **more), source)
        assert {suffix for suffix, _ in files} == {"png"}
        return kept["conversations"][0]["value"], len(files)

    def test_the_rule_of_the_list_and_of_the_record(self, tmp_path: Path) -> None:
        assert self.stored(tmp_path, "<image> a", "axial") == ("<image> a", 1)
        assert self.stored(tmp_path, "<image> a", "axial:3")[0] == "<image>" * 3 + " a"
        assert self.stored(tmp_path, "<image> and <image>", "axial:2") == ("<image> and <image>", 2)
        assert self.stored(tmp_path, "<image> a", "axial:3", nifti_slices="sagittal:@2")[1] == 1

    def test_without_a_rule_the_record_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BadSample, match="image scan.nii.gz: a volume: say which slices"):
            self.stored(tmp_path, "<image> a", None)

    def test_of_a_list_file(self, tmp_path: Path, write_list: Callable) -> None:
        (tmp_path / "scan.nii").write_bytes(volume())
        list_file = write_list(A=[record("<image> a", "yes", "scan.nii")])
        text = list_file.read_text()
        for rule, images in (("axial", 1), ("coronal:4", 4)):
            list_file.write_text(text.replace("}}", f', "nifti_slices": "{rule}"' + "}}"))
            build_shards(list_file, tmp_path / rule[:3])
            assert Shards(tmp_path / rule[:3]).rows["images"].tolist() == [images]
            assert not read_ledger(tmp_path / rule[:3] / REJECTED_FILE)
        list_file.write_text(text.replace("}}", ', "nifti_slices": "middle"}}'))
        with pytest.raises(ValueError, match=r"nifti_slices 'middle' is no rule"):
            build_shards(list_file, tmp_path / "none")


def test_at_most_so_many_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nifti, "MAX_SLICES", 5)
    with pytest.raises(BadSample, match="at most 5"):
        list(decode_slices(volume(), "axial:all"))


class TestStretching:
    """Thick slices are stretched, up to twenty times; a small file may not cost minutes."""

    def thick(self, side: int) -> bytes:
        return volume(np.zeros((side, side, 4), np.uint8), np.diag([19.0, 1, 1, 1]))

    def test_ends_at_a_size_that_the_model_never_sees(self) -> None:
        assert one(self.thick(100), "axial").shape == (100, 1900)
        assert one(self.thick(600), "axial").shape == (108, 2048)
        monstrous = one(self.thick(3000), "axial")  # stored larger than the bound
        assert monstrous.shape == (158, 3000)

    def test_counts_in_the_sum_of_pixels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        turns = record("<image>what", "yes", "a.nii")
        monkeypatch.setattr(pages, "MAX_PIXELS", 2 * 190 * 10)
        assert len(pages.take_pages(turns, [self.thick(10)], "first", "axial:2")[1]) == 2
        with pytest.raises(BadSample, match=r"a volume whose slices exceed 3800 pixels"):
            pages.take_pages(turns, [self.thick(10)], "first", "axial:3")
