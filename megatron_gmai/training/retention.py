"""Which checkpoints of a run stay: the newest ones, and one every so many steps."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_gmai.convert.manifest import LATEST, MANIFEST


def to_remove(iterations: Sequence[int], keep_last: int | None, keep_every: int | None) -> set[int]:
    """The iterations whose checkpoints may go; without `keep_last` all stay."""
    if keep_last is None:
        return set()
    older = sorted(iterations)[:-keep_last]
    return {number for number in older if keep_every is None or number % keep_every}


def remove_old(folder: Path, newest: Path, keep_last: int | None, keep_every: int | None) -> None:
    """Remove what need not stay beside `newest`, which is whole; called on one rank.

    Folders that are not whole stay, and so do later ones (a run that went back writes them again)
    and the one that `latest` names. Each is renamed first: half of a checkpoint never looks whole.

    Raises:
        OSError: one could not be renamed (read-only storage, say).
    """
    for rest in folder.glob(".iter_*.removed"):  # of a run that ended while it removed
        shutil.rmtree(rest, ignore_errors=True)
    whole = {
        int(digits): path
        for path in folder.glob("iter_*")
        if (path / MANIFEST).is_file() and (digits := path.name.removeprefix("iter_")).isdecimal()
    }
    latest = (folder / LATEST).read_text(encoding="utf-8").strip()
    until_now = [number for number, path in whole.items() if path.name <= newest.name]
    for number in to_remove(until_now, keep_last, keep_every):
        path = whole[number]
        if path.name not in (latest, newest.name):
            hidden = path.rename(folder / f".{path.name}.removed")
            shutil.rmtree(hidden, ignore_errors=True)
