"""Checkpoints that stay and go: never the newest, never one that is needed, never half of one."""

import shutil
from pathlib import Path

import pytest

from megatron_gmai.convert.manifest import LATEST, MANIFEST
from megatron_gmai.training.retention import remove_old, to_remove


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (None, None, [10, 20, 30, 40, 50]),
        (None, 20, [10, 20, 30, 40, 50]),
        (1, None, [50]),
        (2, None, [40, 50]),
        (9, None, [10, 20, 30, 40, 50]),
        (1, 20, [20, 40, 50]),
        (2, 30, [30, 40, 50]),
    ],
)
def test_the_last_and_every_nth_stay(
    keep_last: int | None, keep_every: int | None, kept: list[int]
) -> None:
    every = [30, 10, 50, 20, 40]
    assert sorted(set(every) - to_remove(every, keep_last, keep_every)) == kept


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (1, 2, 3, 4, 5):
        (tmp_path / f"iter_{number:07d}").mkdir()
        (tmp_path / f"iter_{number:07d}" / MANIFEST).write_text("{}")
    (tmp_path / "iter_0000001" / MANIFEST).unlink()
    (tmp_path / LATEST).write_text("iter_0000002")
    (tmp_path / "tokenizer.model").write_text("")
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_not_whole_or_later_or_the_latest_is_left_alone(folder: Path) -> None:
    """A run that went back to iteration 2 has just saved 4."""
    remove_old(folder, folder / "iter_0000004", keep_last=1, keep_every=None)
    kept = ["iter_0000001", "iter_0000002", "iter_0000004", "iter_0000005"]
    assert names(folder) == [*kept, LATEST, "tokenizer.model"]


def test_what_an_interrupted_removal_left_goes_with_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(shutil, "rmtree", lambda *arguments, **options: None)
        remove_old(folder, folder / "iter_0000004", keep_last=1, keep_every=None)
    assert ".iter_0000003.removed" in names(folder)
    remove_old(folder, folder / "iter_0000004", keep_last=1, keep_every=None)
    assert ".iter_0000003.removed" not in names(folder)
