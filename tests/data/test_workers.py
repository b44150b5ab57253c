"""Worker processes change the speed of the loader and nothing else."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from megatron_gmai.data.loading.batch import MicroBatch
from megatron_gmai.data.loading.dataset import ALL_IMAGES, NumberedPack, PackDataset
from megatron_gmai.data.loading.loader import HELD, PREFETCH, iterate
from megatron_gmai.layout import ImageShare
from tests.data.world import mixed_records, open_list


class Fatal(PackDataset):
    """Ends the process that reads the poisonous sample, as a crash in a decoder would."""

    poison = 7

    def __reduce__(self) -> tuple[type[PackDataset], tuple[Any, ...]]:
        return Fatal, super().__reduce__()[1]

    def assemble(
        self,
        packs: Sequence[NumberedPack],
        image_share: ImageShare | None = ALL_IMAGES,
        memory: np.ndarray | None = None,
    ) -> MicroBatch:
        if any(piece.sample == self.poison for _, pieces in packs for piece in pieces):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().assemble(packs, image_share, memory)


@pytest.fixture
def dataset(tmp_path: Path, write_list: Callable, tokenizer_file: Path) -> PackDataset:
    return open_list(write_list(A=mixed_records(tmp_path, 40)), tokenizer_file)


def loader_processes() -> set[int]:
    """Descendants of this process, without the helpers that multiprocessing keeps for next time."""
    helpers = ("resource_tracker", "forkserver")
    own = psutil.Process()
    servers = [c for c in own.children() if any(h in " ".join(c.cmdline()) for h in helpers)]
    everyone = {child.pid for child in own.children(recursive=True)}
    return everyone - {server.pid for server in servers}


def same(a: MicroBatch, b: MicroBatch) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_batch(dataset: PackDataset, workers: int) -> None:
    total = dataset.total_packs(1)

    def batches(num_workers: int) -> Iterator[MicroBatch]:
        return iterate(dataset, 0, 1, 2, 4, 0, total, num_workers=num_workers)

    before = loader_processes()
    assert all(same(*pair) for pair in zip(batches(0), batches(workers), strict=True))
    assert loader_processes() == before


def test_batches_that_are_kept_are_not_overwritten(dataset: PackDataset) -> None:
    total = dataset.total_packs(2)
    kept = list(iterate(dataset, 0, 1, 1, 1, 0, total, num_workers=1))
    assert len(kept) > PREFETCH + HELD, "more than there are slots"
    assert all(
        same(*pair) for pair in zip(iterate(dataset, 0, 1, 1, 1, 0, total), kept, strict=True)
    )


def test_closing_an_endless_loader_ends_its_workers(dataset: PackDataset) -> None:
    before = loader_processes()
    batches = iterate(dataset, 0, 1, 1, 2, num_workers=2)
    next(batches)
    assert len(loader_processes() - before) == 2
    batches.close()  # type: ignore[attr-defined]
    assert loader_processes() == before


def test_a_dead_worker_is_reported_with_its_samples(dataset: PackDataset) -> None:
    fatal = Fatal(*dataset.__reduce__()[1])
    place = dataset.shards.place(Fatal.poison)
    with pytest.raises(RuntimeError, match=rf"ended unexpectedly.*{place}"):
        list(iterate(fatal, 0, 1, 1, 1, 0, dataset.total_packs(1), num_workers=1))


def test_an_error_of_a_worker_is_its_message_alone(dataset: PackDataset, tmp_path: Path) -> None:
    for path in (tmp_path / "shards").glob("*.tar"):
        path.rename(tmp_path / "moved.tar")
    with pytest.raises(ValueError, match="^cannot open shard .*tar: No such file") as error:
        next(iterate(dataset, 0, 1, 1, 1, num_workers=1))
    assert "Traceback" not in str(error.value)
