"""The manifest that makes a checkpoint folder whole: written last, it names every file's
size and checksum."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_gmai.config import Config, ModelConfig
from megatron_gmai.convert.safe_metadata import check_metadata

MANIFEST = "manifest.json"
_PART_BYTES = 1 << 24
LATEST = "latest"  # beside the checkpoints: the name of the newest whole one


@dataclass(frozen=True)
class Manifest:
    """What a whole checkpoint says of itself."""

    path: Path  # of its folder
    position: dict[str, Any]  # how far the run has come (`training.checkpoint.Position`)
    config: Config
    has_optimizer: bool
    names: frozenset[str]  # of its tensors
    checksums: dict[str, int]  # CRC-32 by file; empty in checkpoints of earlier versions


def write_manifest(
    folder: Path,
    position: dict[str, Any],
    config: Config,
    has_optimizer: bool,
    checksums: Mapping[str, int] | None = None,
) -> None:
    """Describe the files that lie in `folder`; nothing may be added to it afterwards.

    `checksums` are the CRC-32 that are known; other files are read for theirs.

    Raises:
        OSError: a file that has a checksum is not there: its rank wrote to another storage.
    """
    paths = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    files = {name: path.stat().st_size for name, path in paths.items()}
    known = checksums or {}
    if absent := sorted(set(known) - set(paths)):
        raise OSError(f"{folder} has no {absent[0]}: all ranks have to write to the same storage")
    manifest = {
        "position": position,
        "has_optimizer": has_optimizer,
        "files": files,
        "crc32": {n: known[n] if n in known else crc32_of(paths[n]) for n in paths},
        "config": json.loads(config.to_json()),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_manifest(path: Path) -> Manifest:
    """Check a checkpoint folder, or the newest one in a folder of checkpoints.

    Raises:
        ValueError: nothing there, a file missing or of the wrong size, one without tensors of the
            layout that has changed, a manifest that does not read, or metadata that would run code
            when it is loaded.
    """
    if (path / LATEST).is_file():
        path = path / Path((path / LATEST).read_text(encoding="utf-8").strip()).name
    if not (path / MANIFEST).is_file():
        raise ValueError(
            f"{path} is not a whole checkpoint: it has no {MANIFEST}. "
            "Give a folder iter_NNNNNNN that a run has finished writing, or its parent."
        )
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        position = dict(manifest["position"])
        config = Config.from_json(json.dumps(manifest["config"]))
        has_optimizer = bool(manifest["has_optimizer"])
        stored = dict(manifest.get("crc32", {}))
        checksums = {name: int(stored[name]) for name in files if name in stored}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path / MANIFEST} cannot be read: {error}") from error
    for name, size in files.items():
        file = path / name
        if file.parent != path or not file.is_file() or file.stat().st_size != size:
            found = file.stat().st_size if file.is_file() else "no file"
            raise ValueError(
                f"{path} is damaged: {name} should have {size} bytes, found {found}. "
                "Use an earlier checkpoint."
            )
        # Those of tensors are large; who reads a tensor checks it (`saved_tensor`).
        is_small = not name.endswith(".distcp")
        if is_small and name in checksums and crc32_of(file) != checksums[name]:
            raise ValueError(
                f"{path} is damaged: {name} has changed since it was written. "
                "Use an earlier checkpoint."
            )
    names = check_metadata(path / ".metadata")
    _check_sizes(path / MANIFEST, config.model, len(names))
    return Manifest(path, position, config, has_optimizer, names, checksums)


def _check_sizes(path: Path, model: ModelConfig, tensors: int) -> None:
    """A table of all weights is made of these sizes before one of them is looked for."""
    for part in (model.vision, model.language):
        for name, value in asdict(part).items():
            if not isinstance(value, bool) and not 0 < value < float("inf"):
                raise ValueError(f"{path} cannot be read: {name} is {value}, not above 0")
        if part.num_layers > tensors + 1:  # CLIP's last one is not among them
            raise ValueError(f"{path} speaks of {part.num_layers} layers, with {tensors} tensors")


def crc32_of(path: Path) -> int:
    """CRC-32 of a file's bytes, read in parts."""
    value = 0
    with path.open("rb") as file:
        while part := file.read(_PART_BYTES):
            value = zlib.crc32(part, value)
    return value
