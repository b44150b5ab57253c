"""torch's distributed checkpoints keep their table of contents as a pickle; allow only plain tables."""

import pickle
from pathlib import Path
from typing import Any

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("builtins", "set"),
    ("_io", "BytesIO"),
}
_ALLOWED_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
)


class _TablesOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _ALLOWED or module in _ALLOWED_MODULES
        if not (known or (module == "torch" and name.startswith(("float", "bfloat", "int", "uint")))):
            raise ValueError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def check_metadata(path: Path) -> None:
    """Refuse a `.metadata` file that would do more than build tables of tensors when it is read.

    Raises:
        ValueError: the file is missing, is no pickle, or names anything else than the classes of
            `torch.distributed.checkpoint`.
    """
    try:
        with path.open("rb") as file:
            _TablesOnly(file).load()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{path} is not the metadata of a checkpoint and was not loaded: {error}"
        ) from error
