"""Checkpoints: torch's distributed format in folders that are either whole or refused.

    SAVE/iter_0000100/     tensors of all ranks, in any layout's reach
                      carried.safetensors   parts of CLIP that are never run, for an export
                      manifest.json   written last: size and CRC-32 of every file, position, config
    SAVE/latest            name of the newest whole checkpoint

A checkpoint is written under a temporary name and renamed when its manifest is in place.
"""

import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import CheckpointException

from megatron_gmai.config import Config, LoraConfig
from megatron_gmai.convert.carried import write_carried
from megatron_gmai.convert.manifest import LATEST, MANIFEST, read_manifest, write_manifest
from megatron_gmai.data.plan.plan import Bookmark
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.training import optimizer_state
from megatron_gmai.training.checkpoint_files import (
    first_failure,
    on_first_rank,
    read_pieces,
    write_pieces,
)
from megatron_gmai.training.checksums import changed_files, checksums_of_all_ranks
from megatron_gmai.training.pieces import Piece
from megatron_gmai.training.rng import restore_rng, rng_piece
from megatron_gmai.training.shares import Held, own_share
from megatron_gmai.training.weights import weight_pieces
from megatron_gmai.weights import in_words


@dataclass(frozen=True)
class Position:
    """How far a run has come: all that resuming needs besides tensors."""

    iteration: int = 0
    consumed_packs: int = 0
    optimizer_steps: int = 0  # fewer than iterations where fp16 overflowed
    bookmark: Bookmark | None = None  # saves planning what was consumed; nothing depends on it


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or of another model."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    position: Position
    config: Config
    has_optimizer: bool
    names: frozenset[str]  # of its tensors


def save_checkpoint(
    folder: Path,
    position: Position,
    chunks: Sequence[GMAIVL],
    optimizer: MegatronOptimizer | None,
    config: Config,
    carried: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder/iter_N` from all ranks; earlier checkpoints stay as they are.

    The weights must be whole (`finish_param_gather`). Rank 0 also writes what the run carries along
    for an export (`convert.carried`).

    Raises:
        CheckpointError: writing failed (a full disk, say). What was written is removed.
    """
    pieces = pieces_to_write(chunks, optimizer, config)
    has_optimizer = optimizer is not None
    return write_checkpoint(folder, position, pieces, config, has_optimizer, carried)


def pieces_to_write(
    chunks: Sequence[GMAIVL], optimizer: MegatronOptimizer | None, config: Config
) -> list[Piece]:
    """This rank's share of a checkpoint."""
    if optimizer is not None:
        optimizer_state.allocate(optimizer)  # a run that is saved before its first step
    held = _held(chunks, optimizer, config.lora)
    return own_share(list(held), chunks[0].groups)


def write_checkpoint(
    folder: Path,
    position: Position,
    pieces: Sequence[Piece],
    config: Config,
    has_optimizer: bool,
    carried: Mapping[str, Tensor] | None = None,
    group: ProcessGroup | None = None,
) -> Path:
    """`save_checkpoint` of pieces, over a process group of all ranks (default: the world)."""
    final = folder / f"iter_{position.iteration:07d}"
    temporary = folder / f".{final.name}.incomplete"
    pointer = folder / f".{LATEST}.tmp"

    def begin() -> None:
        for unfinished in folder.glob(".iter_*.incomplete"):  # of a run that ended while it saved
            _remove(unfinished)
        temporary.mkdir(parents=True)

    def finish() -> None:
        write_carried(temporary, carried or {})
        write_manifest(temporary, asdict(position), config, has_optimizer, checksums)
        pointer.write_text(final.name, encoding="utf-8")
        for path in (temporary / MANIFEST, temporary, pointer):
            _force_to_disk(path)  # before an older checkpoint may go: power can fail
        _remove(final)  # of an earlier run; nothing from here on needs space
        temporary.rename(final)
        pointer.replace(folder / LATEST)
        _force_to_disk(folder)

    try:
        on_first_rank(begin, group)
        write_pieces(pieces, temporary, group)
        checksums = checksums_of_all_ranks(temporary, group)
        on_first_rank(finish, group)
    except OSError as error:
        if dist.get_rank() == 0:
            _remove(temporary)
            with suppress(OSError):  # read-only storage
                pointer.unlink(missing_ok=True)
        raise CheckpointError(
            f"could not save {final}: {error}\n"
            f"Nothing of it was kept; earlier checkpoints in {folder} are untouched. "
            "Free space or mend the path, then continue with --resume."
        ) from error
    return final


def open_checkpoint(path: Path) -> Checkpoint:
    """Check a checkpoint folder, or the newest one in a folder of checkpoints.

    Raises:
        CheckpointError: nothing there, a file missing or of the wrong size, a manifest that does
            not read, or metadata that would run code when it is loaded.
    """
    try:
        found = read_manifest(path)
        position = _position(**found.position)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(str(error)) from error
    return Checkpoint(found.path, position, found.config, found.has_optimizer, found.names)


def _position(bookmark: dict[str, Any] | None = None, **numbers: Any) -> Position:
    """Checkpoints of earlier versions have no bookmark."""
    if bookmark is None:
        return Position(**numbers)
    starts = tuple(bookmark["epoch_starts"])
    return Position(**numbers, bookmark=Bookmark(**{**bookmark, "epoch_starts": starts}))


def verify_checkpoint(checkpoint: Checkpoint, group: ProcessGroup | None = None) -> None:
    """Read all of a checkpoint once, shared out over the ranks, for its checksums.

    Raises:
        CheckpointError: on every rank, if bytes have changed since it was written.
    """
    try:
        changed = changed_files(checkpoint.path, group)
    except OSError as error:
        raise CheckpointError(f"{checkpoint.path} cannot be read: {error}") from error
    if changed:
        raise CheckpointError(
            f"{checkpoint.path} is damaged: {'; '.join(changed[:8])}. Use an earlier checkpoint."
        )


def newest_whole_checkpoint(
    folder: Path, except_for: Collection[Path] = ()
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in `folder` that is whole, and why newer ones were passed over."""
    skipped: list[str] = []
    for path in sorted(set(folder.glob("iter_*")).difference(except_for), reverse=True):
        try:
            return open_checkpoint(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def load_checkpoint(
    checkpoint: Checkpoint,
    chunks: Sequence[GMAIVL],
    optimizer: MegatronOptimizer | None,
    group: ProcessGroup | None = None,
) -> None:
    """Fill the chunks, and the optimizer if given, from a checkpoint of any layout.

    Raises:
        CheckpointError: the checkpoint is of another model, or holds no optimizer state.
    """
    if optimizer is not None and not checkpoint.has_optimizer:
        raise CheckpointError(
            f"{checkpoint.path} holds weights only (--checkpoint-drop-optimizer), so a run cannot "
            "resume from it. Start from its weights with --load."
        )
    _check_adapters(checkpoint, chunks[0], resumes=optimizer is not None)
    if optimizer is not None:
        optimizer_state.allocate(optimizer)
    # Adapters on top of a checkpoint without any keep the values that they start from.
    pieces = [held.piece for held in _held(chunks, optimizer, checkpoint.config.lora)]
    # States of random numbers of another layout are left alone.
    pieces = [p for p in pieces if not p.name.startswith("rng.") or p.name in checkpoint.names]
    _read(checkpoint, pieces, group)
    if optimizer is not None:
        optimizer_state.set_steps(optimizer, checkpoint.position.optimizer_steps)
    for piece in pieces:
        if piece.name.startswith("rng."):
            restore_rng(piece.tensor)


def _check_adapters(checkpoint: Checkpoint, chunk: GMAIVL, resumes: bool) -> None:
    """Its adapters lie on weights that it does not hold, so they fit towers with adapters alone."""
    saved = checkpoint.config.lora
    own = {weight.tower for weight in chunk.table.values() if weight.is_adapter}
    if saved.towers and own != set(saved.towers):
        raise CheckpointError(
            f"{checkpoint.path} holds adapters of {in_words(saved.towers)}. Continue with "
            f"{saved.flags} alone, or merge them first (tools/convert_checkpoint.py)."
        )
    if resumes and own != set(saved.towers):
        raise CheckpointError(
            f"{checkpoint.path} holds no adapters, so a run that trains some cannot resume from "
            "it. Start from its weights with --load."
        )


def _read(checkpoint: Checkpoint, pieces: Sequence[Piece], group: ProcessGroup | None) -> None:
    try:
        read_pieces(pieces, checkpoint.path, group)
        return
    except CheckpointException as error:  # torch's: not an Exception, so nobody else would see it
        problem = first_failure(error)
    raise CheckpointError(
        f"{checkpoint.path} cannot be loaded: {problem[:300]}\n"
        "Its bytes have changed, or it is of a model with other sizes or other frozen parts. "
        "Use an earlier checkpoint, or the settings that it was trained with."
    )


def _held(
    chunks: Sequence[GMAIVL], optimizer: MegatronOptimizer | None, lora: LoraConfig
) -> Iterator[Held]:
    """All that this rank holds of a checkpoint of a run with these adapters."""
    yield from weight_pieces(chunks, lora)
    if optimizer is not None:
        yield from optimizer_state.optimizer_pieces(optimizer, chunks)
        yield Held(rng_piece(chunks[0].groups))


def _force_to_disk(path: Path) -> None:
    """What was written to a file, or to a folder's list of names, out of the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some storage cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
