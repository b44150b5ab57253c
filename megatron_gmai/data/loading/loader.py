"""Micro-batches for one data-parallel rank, cut from the common stream of packs.

With worker processes, the plan stays in this process and the workers get pieces to read: they hold
no state, so their number changes nothing but the speed.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import torch

from megatron_gmai.data.loading.batch import MicroBatch
from megatron_gmai.data.loading.dataset import ALL_IMAGES, NumberedPack, PackDataset
from megatron_gmai.data.loading.pixel_memory import PixelMemory
from megatron_gmai.data.plan.balance import assign, pack_costs
from megatron_gmai.layout import ImageShare

PREFETCH = 2  # micro-batches per worker: bounds the memory that waits
# Micro-batches that the training step can hold before one has to be sent through a pipe.
HELD = 4


class Job(NamedTuple):
    """The packs of one micro-batch, how many images of the step come before it, and the slot of
    the shared memory for its pixels."""

    packs: list[NumberedPack]
    first_image: int = 0
    slot: int | None = None


class Result(NamedTuple):
    """What a worker hands over: a batch, or the message of the error that ends the run. The pixels
    of `images` images are in the shared memory where there is a `slot`, else in the batch."""

    batch: MicroBatch | None
    error: str | None = None
    slot: int | None = None
    images: int = 0


def iterate(
    dataset: PackDataset,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    global_batch_size: int,
    start_pack: int = 0,
    total_packs: int | None = None,
    num_workers: int = 0,
    image_share: ImageShare | None = ALL_IMAGES,
    pin_memory: bool = False,
) -> Iterator[MicroBatch]:
    """Yields this rank's micro-batches, `global_batch_size // (micro_batch_size * dp_size)` a step.

    Step i of the run takes the packs `start_pack + i * global_batch_size` and following. The last
    step before `total_packs` is filled up with empty packs; with None the stream is endless.
    Only the images of `image_share` are decoded and the others left black, for ranks that encode no
    others; with None there are no pixels.
    Batches name the samples that could not be read; whether the run goes on is for all ranks to
    decide together. Closing the iterator ends the workers. Raises ValueError if the sizes do not
    divide, and RuntimeError that names the samples at hand if a worker dies.
    """
    if global_batch_size % (micro_batch_size * dp_size):
        raise ValueError(
            f"--global-batch-size {global_batch_size} is not a multiple of micro batch "
            f"{micro_batch_size} x {dp_size} data-parallel ranks"
        )
    memory = None
    if num_workers and image_share is not None:
        images, side = dataset.max_images(micro_batch_size), dataset.vision.image_size
        memory = PixelMemory(num_workers * PREFETCH + HELD, images, side)
    jobs = _Jobs(
        dataset,
        dp_rank,
        dp_size,
        micro_batch_size,
        global_batch_size,
        start_pack,
        total_packs,
        memory,
    )
    pixels = None if memory is None else memory.pixels
    loader = torch.utils.data.DataLoader(
        _Assembler(dataset, image_share, pixels),
        sampler=jobs,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        multiprocessing_context=_worker_context() if num_workers else None,
        worker_init_fn=_end_with_the_run,
        prefetch_factor=PREFETCH if num_workers else None,
        # The loader draws a seed when it starts. Out of the run's random numbers, a resumed run
        # would have drawn one more than one that ran through.
        generator=torch.Generator(),
    )
    for result in _results(loader, jobs):
        yield _taken_over(result, memory, pin_memory)


def _results(loader: torch.utils.data.DataLoader, jobs: "_Jobs") -> Iterator[Result]:
    """What the workers hand over, with their ends and errors turned into one clear message."""
    results = iter(loader)
    while True:
        try:
            result = next(results)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not loader.num_workers:
                raise
            raise RuntimeError(
                f"a loader process ended unexpectedly ({error}) while the loader worked on "
                f"{jobs.in_flight()}"
            ) from error
        if result.error is not None:
            raise ValueError(result.error)
        jobs.waiting.pop(0)
        yield result


def _taken_over(result: Result, memory: PixelMemory | None, pin_memory: bool) -> MicroBatch:
    """The batch with its pixels, page-locked where there is a device to copy it to."""
    batch = result.batch
    assert batch is not None  # a result without a batch has an error
    if memory is not None and result.slot is not None:
        batch = replace(batch, pixel_values=memory.hand_out(result.slot, result.images))
    return batch.pin_memory() if pin_memory else batch


def _worker_context() -> BaseContext:
    """Workers are forked from a clean helper process that has imported everything once: this
    process has threads and locks (device, process groups) that a fork of it would inherit."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context


def _end_with_the_run(worker: int) -> None:
    """Runs in a worker: it ends when the process that takes its batches is gone, however that came.
    By itself it would wait for ever, as its parent is the helper process, which waits for it."""
    run = multiprocessing.parent_process()
    assert run is not None

    def wait() -> None:
        run.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _unchanged(result: Any) -> Any:
    return result


class _Assembler(torch.utils.data.Dataset):
    """Runs in the workers: a job becomes a micro-batch."""

    def __init__(
        self, dataset: PackDataset, image_share: ImageShare | None, memory: torch.Tensor | None
    ) -> None:
        self.dataset, self.image_share, self.memory = dataset, image_share, memory

    def __getitem__(self, job: Job) -> Result:
        share = None if self.image_share is None else self.image_share.after(job.first_image)
        memory = None
        if self.memory is not None and job.slot is not None:
            memory = self.memory[job.slot].numpy()
        try:
            batch = self.dataset.assemble(job.packs, share, memory)
        except ValueError as error:
            return Result(None, str(error))
        batch = replace(batch, first_image=job.first_image)
        if memory is None:
            return Result(batch)
        images = len(batch.pixel_values)
        batch = replace(batch, pixel_values=batch.pixel_values[:0])
        return Result(batch, None, job.slot, images)


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
        memory: PixelMemory | None,
    ) -> None:
        self.dataset, self.dp_rank, self.dp_size = dataset, dp_rank, dp_size
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.start_pack, self.total_packs, self.memory = start_pack, total_packs, memory
        self.waiting: list[Job] = []

    def __iter__(self) -> Iterator[Job]:
        start = self.start_pack
        while self.total_packs is None or start < self.total_packs:
            for packs, first_image in self._step(start):
                slot = self.memory.take() if self.memory else None
                job = Job(packs, first_image, slot)
                self.waiting.append(job)
                yield job
            start += self.global_batch_size

    def _step(self, start: int) -> list[tuple[list[NumberedPack], int]]:
        """The packs of this rank's micro-batches, and the images of the step before each."""
        stop = start + self.global_batch_size
        if self.total_packs is not None:
            stop = min(stop, self.total_packs)
        packs = self.dataset.plan.packs(start, stop)
        packs = packs.filled_up(self.global_batch_size)
        images, attention = pack_costs(packs, self.dataset.shards.rows["images"])
        order = assign(images, attention, self.dp_size, self.micro_batch_size)[:, self.dp_rank]
        counts = images[order].sum(1)
        return [
            ([(start + pack, packs.pieces(pack)) for pack in micro.tolist()], int(first))
            for micro, first in zip(order, counts.cumsum() - counts, strict=True)
        ]

    def in_flight(self) -> str:
        """The samples that workers have been given and not handed back, for a message."""
        samples = [
            piece.sample for job in self.waiting for _, pieces in job.packs for piece in pieces
        ]
        locations = ", ".join(self.dataset.shards.location(sample) for sample in samples[:20])
        return f"{len(samples)} samples: {locations}" + (", ..." if len(samples) > 20 else "")
