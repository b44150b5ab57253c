"""The manifest that makes a checkpoint folder whole: written last, it names every file's size."""

import json
from pathlib import Path
from typing import Any

from megatron_gmai.config import Config

MANIFEST = "manifest.json"
LATEST = "latest"  # beside the checkpoints: the name of the newest whole one


def write_manifest(
    folder: Path, position: dict[str, Any], config: Config, has_optimizer: bool
) -> None:
    """Describe the files that lie in `folder`.

    Args:
        position: how far the run has come (`training.checkpoint.Position`).
        has_optimizer: whether a run can resume from it.
    """
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    manifest = {
        "position": position,
        "has_optimizer": has_optimizer,
        "files": files,
        "config": json.loads(config.to_json()),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
