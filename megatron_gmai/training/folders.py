"""The folders of a run: they can be written, the run has them to itself, all ranks see the same."""

import errno
import fcntl
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from megatron_gmai.config import Config
from megatron_gmai.data.files import write_atomically
from megatron_gmai.data.lock import BEAT_S, open_lock
from megatron_gmai.data.prepare import copy_tokenizer
from megatron_gmai.runtime.environment import record_start
from megatron_gmai.training.watchdog import spans

LOCK_FILE = ".run.lock"
FULL = (errno.ENOSPC, errno.EDQUOT)


def make_folders(config: Config) -> None:
    """Make the work directory and the checkpoint folder.

    Raises:
        ValueError: they cannot be made here.
    """
    for folder in (config.run.work_dir, config.run.save):
        assert folder is not None
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(_not_writable(folder, error)) from error


def take_folders(config: Config, resume: Path | None) -> IO[str] | None:
    """Hold the checkpoint folder, record this start, and compare what the ranks see; all call it.

    The folder is held as long as rank 0 keeps what it gets.

    Raises:
        ValueError: another run writes there, or the ranks do not share it.
    """
    assert config.run.save is not None
    folder, lock = Path(config.run.save), None
    if dist.get_rank() == 0:
        lock = hold(folder)
        record_run(config, dist.get_world_size())
    check_shared(folder, resume)
    return lock


def record_run(config: Config, processes: int) -> None:
    """Keep the effective configuration and this start beside the run, and its tokenizer beside the
    checkpoints: with them the next phase has all it needs. Called on one rank.

    A disk that is full now may have space at the next checkpoint, so that is only told.

    Raises:
        ValueError: the folders cannot be written.
    """
    work_dir = Path(config.run.work_dir)
    assert config.data.tokenizer is not None and config.run.save is not None
    try:
        write_atomically(work_dir / "config.json", config.to_json().encode())
        record_start(work_dir, processes)
        copy_tokenizer(config.data.tokenizer, config.run.save)
    except OSError as error:
        if error.errno not in FULL:
            raise ValueError(_not_writable(error.filename or work_dir, error)) from error
        print(f"warning: {error}: configuration or tokenizer of this run are not kept", flush=True)


def _not_writable(path: str | Path, error: OSError) -> str:
    return f"{path} cannot be written: {error.strerror}; give another --work-dir or --save"


def hold(folder: Path) -> IO[str] | None:
    """Keep other runs out of a folder of checkpoints for the life of this process; one rank calls
    it and keeps what it returns. None where the storage knows no locks.

    The lock is the operating system's, so it goes with its process. A server can keep the lock of a
    machine that is gone: it counts only as long as somebody touches the file.

    Raises:
        ValueError: another run writes there, or the lock is a link or a pipe.
    """
    file = folder / LOCK_FILE
    try:
        handle = os.fdopen(open_lock(file), "r+", encoding="utf-8")
    except OSError:  # a full disk, say
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process, not of its children
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN) and _is_touched(file):
            handle.seek(0)
            raise ValueError(
                f"{folder} is in use by {handle.read() or 'another run'}, whose checkpoints this "
                "run would write over; end it first, or give another --work-dir"
            ) from error
        return None
    with suppress(OSError):
        handle.truncate(0)
        job = os.environ.get("SLURM_JOB_ID")
        of_job = f", job {job}" if job else ""
        handle.write(f"process {os.getpid()} on {socket.gethostname()}{of_job}")
        handle.flush()
    threading.Thread(target=_beat, args=(file,), daemon=True).start()
    return handle


def _beat(file: Path) -> None:
    while True:
        with suppress(OSError):
            os.utime(file)
        time.sleep(BEAT_S)


def _is_touched(file: Path) -> bool:
    """Whether its holder lives. Each look opens the file anew: network storage remembers times."""
    first = _time(file)
    for _ in range(30):
        time.sleep(BEAT_S / 10)
        if _time(file) != first:
            return True
    return False


def _time(file: Path) -> int:
    with file.open(encoding="utf-8") as handle:
        return os.fstat(handle.fileno()).st_mtime_ns


def check_shared(folder: Path, resume: Path | None) -> None:
    """Compare what all ranks see of `folder`, and the checkpoint `resume` that each goes on from.

    On folders that are not shared every node would write a part of each checkpoint, none of them
    whole; storage that lists a folder late could let ranks go on from different steps.

    Raises:
        ValueError: on every rank, if they do not see the same.
    """
    sign: list[Path | None] = [_leave_sign(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(sign, src=0)
    sees = sign[0] is None or (folder / sign[0].name).exists()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (socket.gethostname(), sees, resume and resume.name))
    if dist.get_rank() == 0 and sign[0] is not None:
        with suppress(OSError):
            sign[0].unlink()
    if problem := _difference(every):
        raise ValueError(f"{problem} Put {folder} on storage that all nodes share.")


def _leave_sign(folder: Path) -> Path | None:
    """An empty file of a name that no node can have looked for; None where nothing can be written,
    which the first save will tell."""
    file = folder / f".shared-{uuid.uuid4().hex}"
    with suppress(OSError):
        file.touch()
        return file
    return None


def _difference(every: list[tuple[str, bool, str | None]]) -> str:
    """What ranks see that rank 0 does not see; empty text if all see the same."""
    host, _, first = every[0]
    if blind := [rank for rank, (_, sees, _) in enumerate(every) if not sees]:
        return (
            f"{spans(blind)} ({every[blind[0]][0]}) cannot see what rank 0 ({host}) writes to the "
            "checkpoint folder."
        )
    if other := [rank for rank, (_, _, name) in enumerate(every) if name != first]:
        return (
            f"{spans(other)} ({every[other[0]][0]}) would resume from {every[other[0]][2]}, rank 0 "
            f"({host}) from {first}."
        )
    return ""
