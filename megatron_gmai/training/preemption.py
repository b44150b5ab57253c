"""Stop signals: a warning before a time limit, or a preemption, becomes a checkpoint after a step.

Slurm sends SIGUSR1 (`--signal`) and SIGTERM (preemption) to every process of a job, so the loader's
processes must outlive them too, or the step in progress cannot end. A blocked signal is inherited
by all threads and children, which a Python handler is not: the signals are blocked, and the loop
asks between two steps whether one is pending.
"""

import signal
from multiprocessing import resource_tracker

STOP_SIGNALS = frozenset({signal.SIGUSR1, signal.SIGTERM})
# Exit status of a run that has saved and wants to go on later. No shell or signal uses this number.
REQUEUE_STATUS = 85


def postpone_stop_signals() -> None:
    """Keep stop signals pending. Call before any thread or child process is started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # torchrun may have been told to ignore them
    # Starting this helper of multiprocessing unblocks SIGTERM (before Python 3.12), so it is
    # started now and not with the loader, whose processes would inherit that.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def stop_requested() -> bool:
    """Whether a stop signal has come to this process since `postpone_stop_signals`."""
    return not STOP_SIGNALS.isdisjoint(signal.sigpending())


def obey_stop_signals() -> None:
    """Stop signals end this process again, a pending one at once: for a run that has failed."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
