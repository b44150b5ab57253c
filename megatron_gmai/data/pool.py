"""Worker processes for long jobs on files.

Workers are fresh interpreters, not forks: a fork would inherit threads and locks (device, process
groups), and multiprocessing's other ways import the main script again in each. A worker ends with
the process that started it, however that ended, and one that dies is named with what it was at.
"""

import contextlib
import mmap
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

POLL_S = 0.25
# report(items, bytes): done so far with this job; the next item is about to begin.
Report = Callable[[int, int], None]
Work = Callable[[Any, Report], Any]


class WorkerDied(RuntimeError):
    """A worker ended in the middle of `job`, at its item number `item`."""

    def __init__(self, job: Any, item: int, status: int) -> None:
        cause = (
            "killed, as when memory runs out" if status == -signal.SIGKILL else f"status {status}"
        )
        super().__init__(f"a worker process ended unexpectedly ({cause})")
        self.job, self.item = job, item


def available_cores() -> int:
    """Cores that this process may use, which a scheduler can have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    work: Work, jobs: Sequence[Any], workers: int, report: Report = lambda items, size: None
) -> Iterator[tuple[int, Any]]:
    """Yields (number of the job, `work(job, report)`) as jobs are done, in any order.

    `workers` processes share the jobs (0: this one does all). `work` is a function of a module, or
    a partial of one. `report` gets the items and bytes of all jobs so far, a few times a second.
    Raises what `work` raises, and WorkerDied.
    """
    if not workers:
        yield from _run_here(work, jobs, report)
        return
    pool = _Pool(work, min(workers, len(jobs)))
    try:
        yield from pool.run(jobs, report)
    finally:
        pool.end()


def _run_here(work: Work, jobs: Sequence[Any], report: Report) -> Iterator[tuple[int, Any]]:
    items = size = 0
    for number, job in enumerate(jobs):
        done = [0, 0]

        def at(job_items: int, job_size: int, done: list[int] = done) -> None:
            done[:] = job_items, job_size
            report(items + job_items, size + job_size)  # noqa: B023  (called in this round only)

        result = work(job, at)
        items, size = items + done[0], size + done[1]
        yield number, result


class _Worker:
    """One process, and the two numbers that it keeps in memory which both see."""

    def __init__(self, work: bytes) -> None:
        self.connection, theirs = Pipe()
        with tempfile.TemporaryFile() as file:
            file.truncate(mmap.PAGESIZE)
            self.done = np.frombuffer(mmap.mmap(file.fileno(), mmap.PAGESIZE), np.int64, 2)
            handles = (theirs.fileno(), file.fileno())
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, *map(str, handles)],
                pass_fds=handles,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C at a terminal is for the parent alone
            )
        theirs.close()
        self.connection.send_bytes(work)
        self.number: int | None = None

    def start(self, number: int, job: Any) -> None:
        self.done[:] = 0
        self.number = number
        self.connection.send(job)


class _Pool:
    def __init__(self, work: Work, size: int) -> None:
        pickled = pickle.dumps(work)
        self.workers = [_Worker(pickled) for _ in range(size)]

    def run(self, jobs: Sequence[Any], report: Report) -> Iterator[tuple[int, Any]]:
        left = iter(enumerate(jobs))
        finished = np.zeros(2, dtype=np.int64)
        busy = [worker for worker in self.workers if self._next(worker, jobs, left)]
        while busy:
            ready = wait([worker.connection for worker in busy], POLL_S)
            for worker in [worker for worker in busy if worker.connection in ready]:
                number, result = self._result(worker, jobs)
                finished += worker.done
                worker.done[:] = 0
                if not self._next(worker, jobs, left):
                    busy.remove(worker)
                yield number, result
            total = finished + sum(worker.done for worker in busy)
            report(int(total[0]), int(total[1]))

    def _next(self, worker: _Worker, jobs: Sequence[Any], left: Iterator[tuple[int, Any]]) -> bool:
        """Gives the worker a job, if there is one left."""
        number, job = next(left, (None, None))
        if number is None:
            return False
        try:
            worker.start(number, job)
        except OSError:
            raise self._death(worker, job) from None
        return True

    def _result(self, worker: _Worker, jobs: Sequence[Any]) -> tuple[int, Any]:
        assert worker.number is not None
        try:
            result, error = worker.connection.recv()
        except (EOFError, OSError):
            raise self._death(worker, jobs[worker.number]) from None
        if error is not None:
            raise error
        return worker.number, result

    def _death(self, worker: _Worker, job: Any) -> WorkerDied:
        return WorkerDied(job, int(worker.done[0]), worker.process.wait())

    def end(self) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()
            worker.connection.close()


def _serve(connection: Connection, memory: int) -> None:
    """Runs in a worker: takes jobs until the parent has gone."""
    done = np.frombuffer(mmap.mmap(memory, mmap.PAGESIZE), np.int64, 2)
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def receive() -> None:
        # In a thread, so that the end of the parent is noticed in the middle of a job.
        with contextlib.suppress(EOFError, OSError):
            while True:
                jobs.put(connection.recv())
        os._exit(1)

    def report(items: int, size: int) -> None:
        done[0], done[1] = items, size

    work = pickle.loads(connection.recv_bytes())
    threading.Thread(target=receive, daemon=True).start()
    while True:
        try:
            connection.send((work(jobs.get(), report), None))
        except Exception as error:
            connection.send((None, error))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
