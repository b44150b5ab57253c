"""CRC-32 of a checkpoint's files: made by the rank that wrote them, checked by all ranks together.

Each file is read once by one rank, however many ranks load it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_gmai.convert.manifest import crc32_of, read_manifest


def checksums_of_all_ranks(folder: Path, group: ProcessGroup | None = None) -> dict[str, int]:
    """CRC-32 of each file of tensors; every rank reads back what it has just written.

    Raises:
        OSError: on every rank, if any of them could not read its file.
    """
    own = folder.glob(f"__{dist.get_rank()}_*.distcp")
    return _gathered(lambda: {path.name: crc32_of(path) for path in own}, group)


def changed_files(checkpoint: Path, group: ProcessGroup | None = None) -> list[str]:
    """What files of a whole checkpoint differ from what was written; the same on every rank.

    Checkpoints of earlier versions have no checksums, so nothing is found in them.

    Raises:
        OSError: on every rank, if any of them could not read its share.
    """
    stored = read_manifest(checkpoint).checksums
    share = sorted(stored)[dist.get_rank() :: dist.get_world_size()]
    found = _gathered(lambda: {name: crc32_of(checkpoint / name) for name in share}, group)
    return [
        f"{name} has the CRC-32 {found[name]:08x}, not {stored[name]:08x}"
        for name in sorted(stored)
        if found[name] != stored[name]
    ]


def _gathered(
    compute: Callable[[], dict[str, int]], group: ProcessGroup | None = None
) -> dict[str, int]:
    """The union of what all ranks compute."""
    own: dict[str, int] | str
    try:
        own = compute()
    except OSError as error:
        own = f"rank {dist.get_rank()}: {error}"
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own, group=group)
    for part in parts:
        if isinstance(part, str):
            raise OSError(part)
    return {name: value for part in parts for name, value in part.items()}
