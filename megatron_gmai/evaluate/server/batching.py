"""Collects requests into batches for one thread that runs the model."""

import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_gmai.evaluate.server.generator import Generator, Piece, Request

GATHER_S = 0.02  # waited for company once a first request is there


class Busy(Exception):
    """Too many requests wait already."""


@dataclass
class Job:
    """A request, and where its pieces go; `deliver` is called from the model's thread."""

    request: Request
    deliver: Callable[[Piece], None]
    left: threading.Event = field(default_factory=threading.Event)  # its client is gone


class Batcher:
    """Runs batches one after the other, in the order in which requests came."""

    def __init__(self, generator: Generator, batch_size: int, most_waiting: int) -> None:
        self.generator, self.batch_size = generator, batch_size
        self._jobs: queue.Queue[Job | None] = queue.Queue(most_waiting)
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

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
        while True:
            jobs, ended = self._gather()
            jobs = [job for job in jobs if not job.left.is_set()]
            if jobs:
                self._answer(jobs)
            if ended:
                return

    def _gather(self) -> tuple[list[Job], bool]:
        """Up to `batch_size` jobs, and whether the end has come."""
        jobs: list[Job] = []
        job = self._jobs.get()
        while job is not None:
            jobs.append(job)
            if len(jobs) == self.batch_size:
                return jobs, False
            try:
                job = self._jobs.get(timeout=GATHER_S)
            except queue.Empty:
                return jobs, False
        return jobs, True

    def _answer(self, jobs: Sequence[Job]) -> None:
        open_places = set(range(len(jobs)))
        steps = self.generator.generate([job.request for job in jobs])
        try:
            for pieces in steps:
                for piece in pieces:
                    jobs[piece.place].deliver(piece)
                    if piece.finish:
                        open_places.discard(piece.place)
                if all(jobs[place].left.is_set() for place in open_places):
                    break
        except Exception:  # one batch is lost, the server goes on
            traceback.print_exc(file=sys.stderr)
        finally:
            close = getattr(steps, "close", None)
            if close is not None:
                close()
            for place in open_places:
                jobs[place].deliver(Piece(place, "", 0, finish="error"))
