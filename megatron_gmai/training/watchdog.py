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

import torch
import torch.distributed as dist

from megatron_gmai.training.preemption import obey_stop_signals

_MOST_SECONDS_BETWEEN_LOOKS = 2.0
_HANG = "watchdog/hang"  # in the store: how many ranks have come to the end of their patience
_STORE_SECONDS = 5.0  # the store may be gone together with its host
# Frames that only pass a call on, and say nothing of where a rank waits.
_WRAPPERS = ("torch", "megatron_gmai.runtime.cpu", "contextlib", "typing_extensions")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Watchdog:
    """Wants to hear from the loop at least once in `timeout` seconds; used as a context.

    Else the stacks of this rank go to `WORK_DIR/stacks.RANK.txt`, torch's record of its collectives
    to `WORK_DIR/collectives_RANK`, one line for all ranks to stderr, and the process ends with
    status 1.
    """

    def __init__(self, work_dir: Path, timeout: float) -> None:
        self.interval = min(_MOST_SECONDS_BETWEEN_LOOKS, timeout / 30)
        self.timeout, self.patience = timeout, timeout - 2.5 * self.interval
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.stacks = work_dir / f"stacks.{self.rank}.txt"
        # A connection of its own: one that waits for a key (of a group that another rank has not
        # joined yet) lets no other thread in.
        store: Any = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]
        self.store = store.clone()  # torch's types know no `clone`
        self.step, self.last, self.looks = 0, time.monotonic(), 0
        self.is_paused = self.store_is_lost = False
        self.unfinished = ""  # collective, once the run ends
        self.heard: dict[int, tuple[int, float]] = {}  # while paused: looks of a rank, since when
        self.peers: list[tuple[str, int]] = [("", 0)] * self.size
        dist.all_gather_object(self.peers, (socket.gethostname(), os.getpid()))
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
        """What may take as long as it takes, writing to slow storage; only the loss of another
        rank ends the run meanwhile."""
        self.heard = {}
        self.is_paused = True
        yield
        self.beat()
        self.is_paused = False

    def _watch(self) -> None:
        while not self.closed.wait(self.interval):
            self._publish()
            if self._has_to_end():
                self._end()

    def _has_to_end(self) -> bool:
        if self._ask(lambda: self.store.check([_HANG])):
            return True  # another rank has lost patience: stacks of all ranks are wanted
        if self.is_paused:
            return self.looks % 8 == 0 and self._lost_a_peer()
        return time.monotonic() - self.last > self.patience

    def _lost_a_peer(self) -> bool:
        """Whether some rank has told nothing for too long; storage that is slow keeps none from
        telling."""
        now = time.monotonic()
        for rank, status in (self._ask(self._statuses) or {}).items():
            looks, since = self.heard.get(rank, (0, now))
            if status["looks"] != looks:
                looks, since = status["looks"], now
            self.heard[rank] = looks, since
        return any(now - since > self.patience for _, since in self.heard.values())

    def _publish(self) -> None:
        self.looks += 1
        status = json.dumps({"looks": self.looks, "does": self.does()})
        self._ask(lambda: self.store.set(_key(self.rank), status))

    def does(self) -> str:
        """Where the main thread is; at the end also what the rank's device waits in."""
        device = f" ({self.unfinished})" if self.unfinished else ""
        return f"{where(sys._current_frames()[self.main])}{device} in step {self.step}"

    def _ask(self, question: Callable[[], Result]) -> Result | None:
        """What the store answers; None once it has failed to, and from then on."""
        answer = None if self.store_is_lost else within(_STORE_SECONDS, lambda: (question(),))
        self.store_is_lost = answer is None
        return answer[0] if answer else None

    def _statuses(self) -> dict[int, dict[str, Any]]:
        """What the ranks have told last."""
        present = [rank for rank in range(self.size) if self.store.check([_key(rank)])]
        return {rank: json.loads(self.store.get(_key(rank))) for rank in present}

    def _end(self) -> None:
        """Dump this rank's stacks; the first of all ranks also tells what each of them does."""
        obey_stop_signals()  # in this thread: torchrun ends the others when one has spoken
        with suppressed_errors(), self.stacks.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        self.unfinished = within(_STORE_SECONDS, unfinished_collective) or ""
        dump = within(_STORE_SECONDS, lambda: flight_recorder("")()) or b""
        with suppressed_errors():
            self.stacks.with_name(f"collectives_{self.rank}").write_bytes(dump)
        turn = self._ask(lambda: self.store.add(_HANG, 1))
        if turn is None:
            time.sleep(min(self.rank, 60) / 2)  # nobody says who speaks: one after the other
        if turn in (1, None):
            self._tell()
        else:
            for _ in range(int(2 + _STORE_SECONDS / self.interval)):  # one that sleeps is not gone
                self._publish()
                time.sleep(self.interval)
        os._exit(1)

    def _tell(self) -> None:
        before = self._ask(self._statuses) or {}
        # Ranks that write their stacks and records tell nothing meanwhile; later they wait for us
        # `_STORE_SECONDS` beyond the first look.
        for _ in range(1 + int(_STORE_SECONDS / (4 * self.interval))):
            time.sleep(2 * self.interval)
            self._publish()
            after = self._ask(self._statuses) or {}
            if not (silent := self._silent(before, after)):
                break
        print(self.line(silent, after), file=sys.stderr, flush=True)
        for rank in silent:
            host, pid = self.peers[rank]
            if host == socket.gethostname():  # a stopped process hears no SIGTERM of torchrun's
                with suppressed_errors():
                    os.kill(pid, signal.SIGKILL)

    def _silent(self, before: dict[int, Any], after: dict[int, Any]) -> set[int]:
        if self.store_is_lost:  # rank 0 has the store, unless torchrun's agent does
            is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            return set() if is_agents else {0} - {self.rank}
        return silent_ranks(before, after, self.size) - {self.rank}

    def line(self, silent: set[int], statuses: dict[int, Any]) -> str:
        """Which ranks wait where, and which do not answer."""
        own = {"does": self.does()}
        ranks_by_action: dict[str, list[int]] = {}
        for rank in range(self.size):
            status = own if rank == self.rank else statuses.get(rank, {"does": "unknown"})
            does = "does not answer" if rank in silent else status["does"]
            ranks_by_action.setdefault(does, []).append(rank)
        actions = "; ".join(f"{spans(ranks)}: {does}" for does, ranks in ranks_by_action.items())
        return (
            f"[rank {self.rank}] step {self.step} made no progress for {self.patience:.0f} s "
            f"(--distributed-timeout-minutes {self.timeout / 60:g}), the run ends. {actions}. "
            f"Stacks: {self.stacks.with_name('stacks.RANK.txt')}"
        )


def flight_recorder(ending: str) -> Any:
    """Torch's record of this rank's collectives, `""` for its files or `"_json"`."""
    torch_c10d: Any = torch._C._distributed_c10d
    of_gloo = getattr(torch_c10d, f"_dump_fr_trace{ending}")
    return getattr(torch_c10d, f"_dump_nccl_trace{ending}", of_gloo)  # absent from builds for CPUs


def unfinished_collective() -> str:
    """The oldest collective that this rank has begun and not finished, if there is one. On GPUs
    Python has gone on when one hangs, so that stacks do not tell which."""
    for entry in json.loads(flight_recorder("_json")())["entries"]:
        if not entry["retired"]:
            group = " ".join(dict.fromkeys(entry["process_group"]))
            return f"{entry['profiling_name']} {entry['input_sizes']} over group {group}"
    return ""


def silent_ranks(before: dict[int, Any], after: dict[int, Any], size: int) -> set[int]:
    """Ranks that have told nothing between two looks at what all have told."""
    return {
        rank
        for rank in range(size)
        if rank not in after or after[rank]["looks"] == before.get(rank, {}).get("looks")
    }


def where(frame: FrameType | None) -> str:
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
    except (OSError, RuntimeError, ValueError, KeyError):
        return


def _key(rank: int) -> str:
    return f"watchdog/{rank}"
