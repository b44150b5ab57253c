"""Writes sharded tensors in Megatron's format; a failure on one rank is a failure on all.

Megatron's own entry point lets one rank fail alone while the others wait for it, and its writer
starts a manager process beside the threads of torch.distributed, which costs seconds for a small
model. The files are the same.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter


def write_sharded(state: dict[str, Any], folder: Path) -> None:
    """Write a state of sharded tensors and small common objects from all ranks.

    Raises:
        OSError: on every rank, if any of them could not write.
    """
    sharded, common = save_preprocess(state)

    def write_common() -> None:
        torch.save(common, folder / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))

    on_first_rank(write_common)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    try:
        torch.distributed.checkpoint.save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=FileSystemWriter(folder),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
    except CheckpointException as error:
        raise OSError(first_failure(error)) from error


def on_first_rank(action: Callable[[], None]) -> None:
    """Run `action` on rank 0; every rank goes on, or raises what stopped rank 0.

    Raises:
        OSError: on every rank, if the action raised OSError or torch's RuntimeError for one.
    """
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except (OSError, RuntimeError) as error:
            problem = [f"rank 0: {error}"]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise OSError(problem[0])


def first_failure(error: CheckpointException) -> str:
    """The first failing rank's message, without the tracebacks of all ranks."""
    rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
    return f"rank {rank}: {cause}"
