"""The manifest that makes a checkpoint folder whole: written last, it names every file's size."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gmai.config import Config
from megatron_gmai.convert.safe_metadata import check_metadata

MANIFEST = "manifest.json"
LATEST = "latest"  # beside the checkpoints: the name of the newest whole one


@dataclass(frozen=True)
class Manifest:
    """What a whole checkpoint says of itself."""

    path: Path  # of its folder
    position: dict[str, Any]  # how far the run has come (`training.checkpoint.Position`)
    config: Config
    has_optimizer: bool
    names: frozenset[str]  # of its tensors


def write_manifest(
    folder: Path, position: dict[str, Any], config: Config, has_optimizer: bool
) -> None:
    """Describe the files that lie in `folder`; nothing may be added to it afterwards."""
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    manifest = {
        "position": position,
        "has_optimizer": has_optimizer,
        "files": files,
        "config": json.loads(config.to_json()),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_manifest(path: Path) -> Manifest:
    """Check a checkpoint folder, or the newest one in a folder of checkpoints.

    Raises:
        ValueError: nothing there, a file missing or of the wrong size, a manifest that does not
            read, or metadata that would run code when it is loaded.
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
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / MANIFEST} cannot be read: {error}") from error
    for name, size in files.items():
        file = path / name
        if file.parent != path or not file.is_file() or file.stat().st_size != size:
            found = file.stat().st_size if file.is_file() else "no file"
            raise ValueError(
                f"{path} is damaged: {name} should have {size} bytes, found {found}. "
                "Use an earlier checkpoint."
            )
    return Manifest(path, position, config, has_optimizer, check_metadata(path / ".metadata"))
