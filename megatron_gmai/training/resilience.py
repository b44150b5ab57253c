"""How a run ends when something goes wrong: every rank soon, the cause told once."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from megatron_gmai.training.preemption import obey_stop_signals

# What torch.distributed says when another rank is gone; that rank tells the cause.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket closed",
    "remote process exited",
)
# torchrun ends all ranks of a machine as soon as one has left. A rank whose error is the same as
# rank 0's, or is only the echo of another's, is ended before it speaks.
_ECHO_SECONDS = 3.0
_LOST_PEER_SECONDS = 15.0
# A user's mistake is mostly the same on all ranks, and is found while they start: on a busy machine
# some do so long before rank 0.
_MISTAKE_SECONDS = 20.0
_PROJECT = Path(__file__).resolve().parents[2]


def run_guarded(main: Callable[[], None]) -> None:
    """Run `main`; turn a user's mistake into one message and any other error into one traceback.

    The process leaves at once, without waiting for collectives that other ranks will not join.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        main()
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        lost_peer = any(sign in str(error) for sign in _LOST_PEER)
        if lost_peer or rank:
            obey_stop_signals()  # so that torchrun can
            time.sleep(_seconds_before_speaking(error, lost_peer))
        if lost_peer:
            message = "another rank is gone; its own message tells why"
        elif is_users_mistake(error):
            message = f"error: {error}"
        else:
            message = traceback.format_exc()
        where = f"[rank {rank}] " if rank or "RANK" in os.environ else ""
        print(f"{where}{message}", file=sys.stderr, flush=True)
        _leave(2 if is_users_mistake(error) else 1)


def _seconds_before_speaking(error: Exception, lost_peer: bool) -> float:
    if lost_peer:
        return _LOST_PEER_SECONDS
    return _MISTAKE_SECONDS if is_users_mistake(error) else _ECHO_SECONDS


def is_users_mistake(error: Exception) -> bool:
    """Whether our own code raised this ValueError on purpose; a library's is our bug."""
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return False
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return raised_in.is_relative_to(_PROJECT) and "site-packages" not in raised_in.parts


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
