"""torch keeps a distributed checkpoint's table of contents as a pickle; allow only plain tables."""

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import BytesStorageMetadata

_DCP = "torch.distributed.checkpoint"
# Exact names: a module as a whole would also offer everything that it imports.
_ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16"}
    | {"int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"},
    "torch.serialization": {"_get_layout"},
    f"{_DCP}.filesystem": {"_StorageInfo"},
    f"{_DCP}.metadata": {"BytesStorageMetadata", "ChunkStorageMetadata", "Metadata"}
    | {"MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"}
    | {"_MEM_FORMAT_ENCODING"},
    f"{_DCP}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


class _TablesOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise ValueError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def check_metadata(path: Path) -> frozenset[str]:
    """The names of a checkpoint's tensors, from its `.metadata` file.

    A file that would do more than build tables of tensors when it is read is refused; so is
    one that declares bytes instead of a tensor, which torch would unpickle. (Megatron's
    empty `_extra_state` entries are never read.)

    Raises:
        ValueError: the file is missing, is no pickle, names anything else than the classes of
            `torch.distributed.checkpoint`, or declares a weight as bytes.
    """
    try:
        with path.open("rb") as file:
            table = _TablesOnly(file).load()
        for name, entry in table.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata) and "._extra_state/" not in name:
                raise ValueError(f"{name} is not a tensor")
        return frozenset(table.state_dict_metadata)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{path} is not the metadata of a checkpoint and was not loaded: {error}"
        ) from error
