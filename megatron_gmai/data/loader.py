"""Micro-batches for one data-parallel rank, cut from the common stream of packs.

With worker processes, the plan stays in this process and the workers get pieces to read: they hold
no state, so their number changes nothing but the speed.
"""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import torch

from megatron_gmai.data.balance import assign, pack_costs
from megatron_gmai.data.batch import MicroBatch
from megatron_gmai.data.dataset import ALL_IMAGES, NumberedPack, PackDataset, Share
from megatron_gmai.data.ledger import Rejection

PREFETCH = 2  # micro-batches per worker: bounds the memory that waits
Job = list[NumberedPack]  # the packs of one micro-batch


class Result(NamedTuple):
    """What a worker hands over: a batch, or the message of the error that ends the run."""

    batch: MicroBatch | None
    rejections: list[Rejection]
    error: str | None = None


def iterate(
    dataset: PackDataset,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    global_batch_size: int,
    start_pack: int = 0,
    total_packs: int | None = None,
    num_workers: int = 0,
    with_pixels: bool = True,
    image_share: tuple[int, int] = ALL_IMAGES,
) -> Iterator[MicroBatch]:
    """Yields this rank's micro-batches, `global_batch_size // (micro_batch_size * dp_size)` a step.

    Step i of the run takes the packs `start_pack + i * global_batch_size` and following. The last
    step before `total_packs` is filled up with empty packs; with None the stream is endless.
    `image_share` (r, n) decodes only the r-th of n equal runs of each micro-batch's images and
    leaves the others black, for ranks that encode no others; without `with_pixels` there are none.
    Closing the iterator ends the workers. Raises ValueError if the sizes do not divide, and
    RuntimeError that names the samples at hand if a worker dies.
    """
    if global_batch_size % (micro_batch_size * dp_size):
        raise ValueError(
            f"--global-batch-size {global_batch_size} is not a multiple of micro batch "
            f"{micro_batch_size} x {dp_size} data-parallel ranks"
        )
    jobs = _Jobs(
        dataset, dp_rank, dp_size, micro_batch_size, global_batch_size, start_pack, total_packs
    )
    loader = torch.utils.data.DataLoader(
        _Assembler(dataset, image_share if with_pixels else None),
        sampler=jobs,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=_worker_context() if num_workers else None,
        prefetch_factor=PREFETCH if num_workers else None,
    )
    results = iter(loader)
    while True:
        try:
            result = next(results)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not num_workers:
                raise
            raise RuntimeError(
                f"a loader process ended unexpectedly ({error}) while the loader worked on "
                f"{jobs.in_flight()}"
            ) from error
        if result.error is not None:
            raise ValueError(result.error)
        jobs.waiting.pop(0)
        if result.rejections:
            dataset.reject(result.rejections)
        yield result.batch


def _worker_context() -> BaseContext:
    """Workers are forked from a clean helper process that has imported everything once: this
    process has threads and locks (device, process groups) that a fork of it would inherit."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context


def _unchanged(result: Any) -> Any:
    return result


class _Assembler(torch.utils.data.Dataset):
    """Runs in the workers: a job becomes a micro-batch."""

    def __init__(self, dataset: PackDataset, image_share: Share) -> None:
        self.dataset, self.image_share = dataset, image_share

    def __getitem__(self, job: Job) -> Result:
        try:
            return Result(*self.dataset.assemble(job, self.image_share))
        except ValueError as error:
            return Result(None, [], str(error))


class _Jobs(torch.utils.data.Sampler[Job]):
    """This rank's share of every step, in order. `waiting` are jobs handed out and not back."""

    def __init__(
        self,
        dataset: PackDataset,
        dp_rank: int,
        dp_size: int,
        micro_batch_size: int,
        global_batch_size: int,
        start_pack: int,
        total_packs: int | None,
    ) -> None:
        self.dataset, self.dp_rank, self.dp_size = dataset, dp_rank, dp_size
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.start_pack, self.total_packs = start_pack, total_packs
        self.waiting: list[Job] = []

    def __iter__(self) -> Iterator[Job]:
        start = self.start_pack
        while self.total_packs is None or start < self.total_packs:
            for job in self._step(start):
                self.waiting.append(job)
                yield job
            start += self.global_batch_size

    def _step(self, start: int) -> list[Job]:
        stop = start + self.global_batch_size
        if self.total_packs is not None:
            stop = min(stop, self.total_packs)
        packs = self.dataset.plan.packs(start, stop)
        packs = packs.filled_up(self.global_batch_size)
        costs = pack_costs(packs, self.dataset.shards.rows["images"])
        order = assign(*costs, self.dp_size, self.micro_batch_size)
        return [
            [(start + pack, packs.pieces(pack)) for pack in micro.tolist()]
            for micro in order[:, self.dp_rank]
        ]

    def in_flight(self) -> str:
        """The samples that workers have been given and not handed back, for a message."""
        samples = [piece.sample for job in self.waiting for _, pieces in job for piece in pieces]
        places = ", ".join(self.dataset.shards.place(sample) for sample in samples[:20])
        return f"{len(samples)} samples: {places}" + (", ..." if len(samples) > 20 else "")
