"""Checkpoints: Megatron's distributed format in folders that are either whole or refused.

    SAVE/iter_0000100/     tensors of all ranks, in any layout's reach
                      carried.safetensors   parts of CLIP that are never run, for an export
                      manifest.json   written last: the size of every file, the position, the config
    SAVE/latest            name of the newest whole checkpoint

A checkpoint is written under a temporary name and renamed when its manifest is in place.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megatron_gmai.config import Config
from megatron_gmai.convert.carried import write_carried
from megatron_gmai.convert.manifest import LATEST, read_manifest, write_manifest
from megatron_gmai.data.plan.plan import Bookmark
from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.runtime.groups import Groups
from megatron_gmai.training import optimizer_state
from megatron_gmai.training.checkpoint_files import first_failure, on_first_rank, write_sharded
from megatron_gmai.training.rng import restore_rng, sharded_rng


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
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer | None,
    config: Config,
    groups: Groups,
    carried: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder/iter_N` from all ranks; earlier checkpoints stay as they are.

    Rank 0 also writes what the run carries along for an export (`convert.carried`).

    Raises:
        CheckpointError: writing failed (a full disk, say). What was written is removed.
    """
    final = folder / f"iter_{position.iteration:07d}"
    temporary = folder / f".{final.name}.incomplete"
    pointer = folder / f".{LATEST}.tmp"

    def begin() -> None:
        _remove(temporary)
        temporary.mkdir(parents=True)

    def finish() -> None:
        write_carried(temporary, carried or {})
        write_manifest(temporary, asdict(position), config, has_optimizer=optimizer is not None)
        pointer.write_text(final.name, encoding="utf-8")
        _remove(final)  # of an earlier run; nothing from here on needs space
        temporary.rename(final)
        pointer.replace(folder / LATEST)

    try:
        on_first_rank(begin)
        write_sharded(_sharded_state(model.module, optimizer, groups, loading=False), temporary)
        on_first_rank(finish)
    except OSError as error:
        if dist.get_rank() == 0:
            _remove(temporary)
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


def newest_whole_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in `folder` that is whole, and why newer ones were passed over."""
    skipped: list[str] = []
    for path in sorted(folder.glob("iter_*"), reverse=True):
        try:
            return open_checkpoint(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def load_checkpoint(
    checkpoint: Checkpoint,
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer | None,
    groups: Groups,
) -> None:
    """Fill the model, and the optimizer if given, from a checkpoint of any layout.

    Raises:
        CheckpointError: the checkpoint is of another model, or holds no optimizer state.
    """
    if optimizer is not None and not checkpoint.has_optimizer:
        raise CheckpointError(
            f"{checkpoint.path} holds weights only (--checkpoint-drop-optimizer), so a run cannot "
            "resume from it. Start from its weights with --load."
        )
    if optimizer is not None:
        optimizer_state.allocate(optimizer)
    state = _sharded_state(model.module, optimizer, groups, loading=True)
    if not checkpoint.names.issuperset(state.get("rng", ())):
        del state["rng"]  # of another layout
    loaded = _load(checkpoint, state)
    _set_weights(model.module, loaded["model"])
    for saved in loaded.get("rng", {}).values():
        restore_rng(saved)
    if optimizer is not None and "optimizer" in loaded:  # a wholly frozen stage has no state
        optimizer_state.restore(
            optimizer, model.module, loaded["optimizer"], checkpoint.position.optimizer_steps
        )


def load_weights(checkpoint: Checkpoint, model: GMAIVL, groups: Groups) -> None:
    """Fill a model without gradient buffers, for inference, from a checkpoint of any layout.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    loaded = _load(checkpoint, _sharded_state(model, None, groups, loading=True))
    _set_weights(model, loaded["model"])


def _load(checkpoint: Checkpoint, state: dict[str, Any]) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(checkpoint.path))
    except (CheckpointingException, UnpicklingError) as error:
        problem = str(error)
    except CheckpointException as error:  # torch's: not an Exception, so nobody else would see it
        problem = first_failure(error)
    raise CheckpointError(
        f"{checkpoint.path} cannot be loaded: {problem[:300]}\n"
        "Its bytes have changed, or it is of a model with other sizes or other frozen parts. "
        "Use an earlier checkpoint, or the settings that it was trained with."
    )


def _set_weights(model: GMAIVL, weights: dict[str, Any]) -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("_extra_state") for name in missing)  # Megatron's linears: empty


def _sharded_state(
    model: GMAIVL,
    optimizer: MegatronOptimizer | None,
    groups: Groups,
    loading: bool,
) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": groups.dp_cp,
        "non_homogeneous_layers": True,  # a key per layer: the canonical names
    }
    state: dict[str, Any] = {"model": model.sharded_state_dict(metadata=metadata)}
    if optimizer is not None:
        state["optimizer"] = optimizer_state.sharded(optimizer, state["model"], loading)
        state["rng"] = sharded_rng(groups)
    return state


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
