"""One thread runs the model: requests join the answers under way, and leave when they are done."""

import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_gmai.evaluate.server.generator import Generator, Piece, Request


class Busy(Exception):
    """Too many requests wait already."""


@dataclass
class Job:
    """A request, and where its pieces go; `deliver` is called from the model's thread."""

    request: Request
    deliver: Callable[[Piece], None]
    left: threading.Event = field(default_factory=threading.Event)  # its client is gone


class Batcher:
    """Answers up to `batch_size` requests at a time; others wait in the order in which they came.

    A request joins between two tokens of the others, and its place is free as soon as its answer
    has ended (continuous batching: Yu et al. 2022, Orca).
    """

    def __init__(self, generator: Generator, batch_size: int, most_waiting: int) -> None:
        self.generator, self.batch_size = generator, batch_size
        self._jobs: queue.Queue[Job | None] = queue.Queue(most_waiting)
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._under_way: list[Job] = []  # the generator's rows
        self._ended = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after what is waiting."""
        self._jobs.put(None)
        self._thread.join()

    def submit(self, job: Job) -> None:
        """Raises Busy if the queue is full."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full as error:
            raise Busy from error

    def _run(self) -> None:
        while self._under_way or not self._ended:
            self._admit(self._waiting())
            if self._under_way:
                self._advance()

    def _waiting(self) -> list[Job]:
        """Jobs for the free places; waits for one if nothing is under way."""
        jobs: list[Job] = []
        while not self._ended and len(self._under_way) + len(jobs) < self.batch_size:
            try:
                job = self._jobs.get(block=not (self._under_way or jobs))
            except queue.Empty:
                break
            if job is None:
                self._ended = True
            elif not job.left.is_set():
                jobs.append(job)
        return jobs

    def _admit(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        try:
            pieces = self.generator.admit([job.request for job in jobs])
        except Exception:  # those under way are not touched
            if len(jobs) == 1:
                _fail(jobs)
            else:  # the fault may be of one of them, or memory enough for one after the other
                for job in jobs:
                    self._admit([job])
            return
        before = len(self._under_way)
        self._under_way += jobs
        self._deliver(pieces, before)

    def _advance(self) -> None:
        try:
            pieces = self.generator.advance()
        except Exception:  # these answers are lost, the server goes on
            _fail(self._under_way)
            self._under_way = []
            self.generator.keep([])
            return
        self._deliver(pieces, 0)

    def _deliver(self, pieces: Sequence[Piece], first: int) -> None:
        """Pieces of the rows from `first` on; rows that end give their place free."""
        going_on = list(range(first))
        for row, piece in enumerate(pieces, first):
            job = self._under_way[row]
            job.deliver(piece)
            if not piece.finish and not job.left.is_set():
                going_on.append(row)
        if len(going_on) < len(self._under_way):
            self.generator.keep(going_on)
            self._under_way = [self._under_way[row] for row in going_on]


def _fail(jobs: Sequence[Job]) -> None:
    traceback.print_exc(file=sys.stderr)
    for job in jobs:
        job.deliver(Piece("", 0, finish="error"))
