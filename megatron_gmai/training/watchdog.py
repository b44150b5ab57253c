"""Ends a run that hangs, and says where: a thread of each rank that watches for progress.

The ranks tell each other through the store that brought them together, which needs no collective:
what they did last, and by the telling itself that they are alive. The first to lose patience tells
for all of them, shortly before the collectives' own time-out, which knows nothing but itself.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import torch.distributed as dist

_MOST_SECONDS_BETWEEN_LOOKS = 2.0
_STORE_SECONDS = 5.0  # the store may be gone together with its host
# Frames that only pass a call on, and say nothing of where a rank waits.
_WRAPPERS = ("torch", "megatron_gmai.runtime.cpu", "contextlib")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Watchdog:
    """Wants to hear from the loop at least once in `timeout` seconds; used as a context.

    Else the stacks of this rank go to `WORK_DIR/stacks.RANK.txt`, one line for all ranks to stderr,
    and the process ends with status 1.
    """

    def __init__(self, work_dir: Path, timeout: float) -> None:
        self.interval = min(_MOST_SECONDS_BETWEEN_LOOKS, timeout / 30)
        self.timeout, self.patience = timeout, timeout - 2.5 * self.interval
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.stacks = work_dir / f"stacks.{self.rank}.txt"
        self.store = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]
        self.step, self.last, self.looks = 0, time.monotonic(), 0
        self.is_paused = False
        self.main = threading.get_ident()
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closed.set()
        self.thread.join()

    def beat(self) -> None:
        """Something was done."""
        self.last = time.monotonic()

    def begin(self, step: int) -> None:
        self.step = step
        self.beat()

    def over(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Passes micro-batches on; each is a sign of life."""
        for batch in batches:
            self.beat()
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What may take as long as it takes: writing to slow storage."""
        self.is_paused = True
        yield
        self.beat()
        self.is_paused = False

    def _watch(self) -> None:
        while not self.closed.wait(self.interval):
            self._publish()
            if not self.is_paused and time.monotonic() - self.last > self.patience:
                self._end()

    def _publish(self) -> None:
        self.looks += 1
        status = {
            "looks": self.looks,
            "does": f"{place(sys._current_frames()[self.main])} in step {self.step}",
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        within(_STORE_SECONDS, lambda: self.store.set(_key(self.rank), json.dumps(status)))

    def _end(self) -> None:
        """Dump this rank's stacks; the first of all ranks also tells what each of them does."""
        with suppressed_errors(), self.stacks.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        turn = within(_STORE_SECONDS, lambda: self.store.add("hang", 1))
        if turn in (1, None):
            before = within(_STORE_SECONDS, self._statuses) or {}
            time.sleep(2 * self.interval)
            self._publish()
            after = within(_STORE_SECONDS, self._statuses) or {}
            print(self.line(before, after), file=sys.stderr, flush=True)
            self._end_silent(before, after)
        else:
            time.sleep(2 * self.interval + _STORE_SECONDS)
        os._exit(1)

    def _statuses(self) -> dict[int, dict[str, Any]]:
        """What the ranks have told last."""
        told = [rank for rank in range(self.size) if self.store.check([_key(rank)])]
        return {rank: json.loads(self.store.get(_key(rank))) for rank in told}

    def line(self, before: dict[int, Any], after: dict[int, Any]) -> str:
        """Which ranks wait where, and which do not answer."""
        places: dict[str, list[int]] = {}
        for rank in range(self.size):
            silent = rank in silent_ranks(before, after, self.size) and rank != self.rank
            does = "does not answer" if silent or rank not in after else after[rank]["does"]
            places.setdefault(does, []).append(rank)
        told = "; ".join(f"{spans(ranks)}: {does}" for does, ranks in places.items())
        return (
            f"[rank {self.rank}] step {self.step} made no progress for {self.patience:.0f} s "
            f"(--distributed-timeout-minutes {self.timeout / 60:g}), the run ends. {told}. "
            f"Stacks: {self.stacks.with_name('stacks.RANK.txt')}"
        )

    def _end_silent(self, before: dict[int, Any], after: dict[int, Any]) -> None:
        """A stopped process hears no SIGTERM; torchrun would wait half a minute for it."""
        for rank in silent_ranks(before, after, self.size):
            if rank != self.rank and after.get(rank, {}).get("host") == socket.gethostname():
                with suppressed_errors():
                    os.kill(after[rank]["pid"], signal.SIGKILL)


def silent_ranks(before: dict[int, Any], after: dict[int, Any], size: int) -> set[int]:
    """Ranks that have told nothing between two looks at what all have told."""
    return {
        rank
        for rank in range(size)
        if rank not in after or after[rank]["looks"] == before.get(rank, {}).get("looks")
    }


def place(frame: FrameType | None) -> str:
    """Where a thread is, in words: the collective, if it is in one, and the function around it."""
    collective = ""
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module == "torch.distributed.distributed_c10d" and not collective:
            collective = f"{name} of "
        if not module.startswith(_WRAPPERS):
            file = Path(frame.f_code.co_filename).name
            return f"{collective}{name} ({file}:{frame.f_lineno})"
        frame = frame.f_back
    return collective or "nothing of Python"


def spans(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    text = ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def within(seconds: float, action: Callable[[], Result]) -> Result | None:
    """What `action` gives, or None if it fails or takes longer."""
    results: list[Result] = []

    def run() -> None:
        with suppressed_errors():
            results.append(action())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


@contextmanager
def suppressed_errors() -> Iterator[None]:
    """Nothing may keep the watchdog from ending the process: full disk, lost store, gone peer."""
    try:
        yield
    except (OSError, RuntimeError, ValueError):
        return


def _key(rank: int) -> str:
    return f"watchdog/{rank}"
