"""Saves checkpoints of a run: at once, or from a copy while training goes on (`--async-save`)."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from megatron_gmai.config import RunConfig
from megatron_gmai.runtime.device import use_device
from megatron_gmai.training.checkpoint import (
    CheckpointError,
    Position,
    pieces_to_write,
    write_checkpoint,
)
from megatron_gmai.training.host_copies import host_copies
from megatron_gmai.training.optimizer import finish_param_gather
from megatron_gmai.training.optimizer_state import steps_taken
from megatron_gmai.training.pieces import Piece
from megatron_gmai.training.retention import remove_old
from megatron_gmai.training.setup import Run


class Saver:
    """Writes the checkpoints of a run, one at a time; every rank has one.

    The ranks agree over a process group of its own, since a thread may write beside training.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.group = run.world.storage
        self.executor = ThreadPoolExecutor(
            1, thread_name_prefix="save", initializer=partial(use_device, run.world.device)
        )
        self.writing: Future[None] | None = None
        self.copies: list[Piece] = []
        if run.config.run.async_save:
            self.writing = self.executor.submit(self._reserve, self._pieces())

    def save(self, iteration: int, must_succeed: bool) -> float:
        """Save this iteration; the seconds that training waited for it.

        Storage that is full or away for a while costs a checkpoint, not the run: unless this one
        `must_succeed` the run warns and tries again at the next interval. One that must is also
        written before this returns.
        """
        run, began = self.run, time.monotonic()
        self.finish()
        settings = run.config.run
        position = self._position(iteration)
        finish_param_gather(run.chunks)
        pieces = self._pieces()
        if must_succeed:
            self._write(position, pieces, must_succeed=True)
        elif settings.async_save:
            self._copy(pieces)
            self.writing = self.executor.submit(self._write, position, self.copies)
        else:
            self._write(position, pieces)
        return time.monotonic() - began

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if one is."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def _pieces(self) -> list[Piece]:
        """What this rank is to write: its own share of the state."""
        run = self.run
        optimizer = None if run.config.run.checkpoint_drop_optimizer else run.optimizer
        return pieces_to_write([chunk.module for chunk in run.chunks], optimizer, run.config)

    def _reserve(self, pieces: list[Piece]) -> None:
        """Take the memory of the copies while the first steps run."""
        self.copies = host_copies(pieces, self.run.world.device)

    def _copy(self, pieces: list[Piece]) -> None:
        """Copy the share: the next step changes it."""
        for copy, piece in zip(self.copies, pieces, strict=True):
            copy.tensor.copy_(piece.tensor.detach())

    def _position(self, iteration: int) -> Position:
        run = self.run
        new_packs = (iteration - run.position.iteration) * run.config.train.global_batch_size
        consumed = run.position.consumed_packs + new_packs
        steps = steps_taken(run.optimizer, run.world.device)
        return Position(iteration, consumed, steps, run.dataset.bookmark(consumed))

    def _write(self, position: Position, pieces: list[Piece], must_succeed: bool = False) -> None:
        """Write, tell and tidy up; a failure is that of all ranks."""
        run, began = self.run, time.monotonic()
        settings = run.config.run
        assert settings.save is not None
        try:
            path = write_checkpoint(
                Path(settings.save),
                position,
                pieces,
                run.config,
                has_optimizer=not settings.checkpoint_drop_optimizer,
                carried=run.carried,
                group=self.group,
            )
            outcome = f"saved {path}"
        except CheckpointError as error:
            if must_succeed:
                raise
            outcome = f"warning: {error}\nTraining goes on and tries again at the next interval."
        if run.world.is_first_rank:
            print(f"{outcome} ({time.monotonic() - began:.1f} s)", flush=True)
            if outcome.startswith("saved"):
                forget_older(path, settings)


def forget_older(path: Path, settings: RunConfig) -> None:
    """Remove the checkpoints that need not stay beside the new one."""
    try:
        remove_old(path.parent, path, settings.keep_last, settings.keep_every)
    except OSError as error:
        print(f"warning: an older checkpoint could not be removed: {error}", flush=True)
