"""Writes and reads the pieces of all ranks in the format of `torch.distributed.checkpoint`.

Each rank writes one file of its own; `.metadata` says which box of which tensor lies where, so a
rank of any other layout reads just the bytes that its own boxes need. Without a process group the
same functions serve one process.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_gmai.convert.safe_metadata import CheckedReader
from megatron_gmai.training.pieces import Piece


def write_pieces(pieces: Sequence[Piece], folder: Path, group: ProcessGroup | None = None) -> None:
    """Write what this rank is to write; every box of every tensor must come from one rank.

    Raises:
        OSError: on every rank, if any of them could not write.
    """
    try:
        dcp.save(
            {},
            storage_writer=dcp.FileSystemWriter(folder),
            planner=_Writing(pieces),
            process_group=group,
            no_dist=not dist.is_initialized(),
        )
    except CheckpointException as error:
        raise OSError(first_failure(error)) from error


def read_pieces(pieces: Sequence[Piece], folder: Path, group: ProcessGroup | None = None) -> None:
    """Fill this rank's pieces from a checkpoint of any layout, cast to their dtypes.

    Raises:
        ValueError: a tensor is missing or has another shape.
        CheckpointException: on every rank, if any of them could not read (it is no Exception).
    """
    dcp.load(
        {},
        storage_reader=CheckedReader(folder),
        planner=_Reading(pieces),
        process_group=group,
        no_dist=not dist.is_initialized(),
    )


class _Writing(SavePlanner):
    """Hands torch the pieces as they are; nothing is derived from a state dict."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = {_index(piece): piece for piece in pieces}

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None: ...

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(index, piece) for index, piece in self.pieces.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans, rewrite_index_hints=False)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.pieces[write_item.index].tensor.detach()


class _Reading(LoadPlanner):
    """Asks torch for the parts of stored boxes that overlap ours, straight into our memory."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = {_index(piece): piece for piece in pieces}
        self.metadata: Metadata | None = None

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata
        if problems := [p for piece in self.pieces.values() if (p := _misfit(piece, stored))]:
            raise ValueError("; ".join(dict.fromkeys(problems[:8])))
        items: list[ReadItem] = []
        for piece in self.pieces.values():
            table = stored[piece.name]
            assert isinstance(table, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(piece.name, table, [_chunk(piece)])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("no piece is bytes")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        piece = self.pieces[MetadataIndex(index.fqn, index.offset)]
        part = piece.tensor.detach()
        for dim, (begin, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(dim, begin, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...


def _index(piece: Piece) -> MetadataIndex:
    return MetadataIndex(piece.name, torch.Size(piece.offsets))


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.size())


def _write_item(index: MetadataIndex, piece: Piece) -> WriteItem:
    return WriteItem(
        index=index,
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_chunk(piece),
            properties=TensorProperties(dtype=piece.tensor.dtype),
            size=torch.Size(piece.shape),
        ),
    )


def _misfit(piece: Piece, stored: dict[str, Any]) -> str | None:
    """Why a checkpoint cannot fill a piece. Checkpoints of earlier versions kept the padding rows
    of the vocabulary, so a stored tensor may have more rows."""
    found = stored.get(piece.name)
    if not isinstance(found, TensorStorageMetadata):
        return f"{piece.name} is missing"
    rows_fit = not piece.shape or found.size[0] >= piece.shape[0]
    if not rows_fit or tuple(found.size[1:]) != piece.shape[1:]:
        return f"{piece.name} has shape {tuple(found.size)}, not {piece.shape}"
    return None


def on_first_rank(action: Callable[[], None], group: ProcessGroup | None = None) -> None:
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
    dist.broadcast_object_list(problem, src=0, group=group)
    if problem[0] is not None:
        raise OSError(problem[0])


def first_failure(error: CheckpointException) -> str:
    """The first failing rank's message, without the tracebacks of all ranks."""
    rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
    return f"rank {rank}: {cause}"
