"""A checkpoint's table of contents, read without running it.

torch keeps `.metadata` as a pickle of its own dataclasses, and its reader unpickles whatever the
file says. Here the file is read by an unpickler that knows the few opcodes of such a table and
makes nothing but records of names and values: no class is looked up, no function called, no
attribute set. The real `Metadata` is then built from the records, and every number in it is
checked. Readers get that one and never the file (`CheckedReader`).
"""

import io
import math
import pickle
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

MOST_BYTES = 2**30
_MOST_BOXES = 2**14  # of one tensor: more than there are ranks
_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_DTYPES = (*_FLOATS, "int64", "int32", "int16", "int8", "uint8", "bool")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_DCP = "torch.distributed.checkpoint."
# What a table is made of, by the class that torch names; the rest of the names is refused.
_KNOWN = {
    **{("torch", name): name for name in (*_DTYPES, "Size")},
    ("collections", "OrderedDict"): "OrderedDict",
    ("pathlib", "PosixPath"): "Path",
    ("pathlib", "PurePosixPath"): "Path",
    ("pathlib._local", "PosixPath"): "Path",
    ("torch.serialization", "_get_layout"): "Layout",
    (f"{_DCP}filesystem", "_StorageInfo"): "StorageInfo",
    **{
        (f"{_DCP}metadata", name): name
        for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex")
        + ("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")
    },
    **{
        (f"{_DCP}planner", name): name
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    },
}


# Opcodes that only make plain values, containers and names.
_PLAIN = """
PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1
LONG4 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 TUPLE TUPLE1 TUPLE2 TUPLE3
EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET LIST DICT APPEND APPENDS SETITEM SETITEMS ADDITEMS
FROZENSET MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL
"""
_PYTHONS: dict[int, Callable[..., None]] = pickle._Unpickler.dispatch


@dataclass(frozen=True)
class _Name:
    """A class that the file names."""

    kind: str


@dataclass(eq=False)
class _Record:
    """An instance that the file describes: its class's name, arguments and state."""

    kind: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


class _Tables(pickle._Unpickler):
    """Makes records. Python's own unpickler: its memo grows with the file, and opcodes can be
    taken out of it."""

    stack: list[Any]
    append: Callable[[Any], None]

    def find_class(self, module: str, name: str) -> _Name:
        if (module, name) not in _KNOWN:
            raise ValueError(f"it asks for {module}.{name}")
        return _Name(_KNOWN[module, name])

    def _make(self) -> None:
        arguments, made = self.stack.pop(), self.stack.pop()
        if not isinstance(made, _Name) or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no class")
        self.append(_Record(made.kind, arguments))

    def _build(self) -> None:
        state, record = self.stack.pop(), self.stack[-1]
        if not isinstance(record, _Record):
            raise ValueError("it sets attributes of what is no record")
        record.state = state

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **{getattr(pickle, name)[0]: _PYTHONS[getattr(pickle, name)[0]] for name in _PLAIN.split()},
        pickle.REDUCE[0]: _make,
        pickle.NEWOBJ[0]: _make,
        pickle.BUILD[0]: _build,
    }


class CheckedReader(dcp.FileSystemReader):
    """torch's reader of a checkpoint folder, over a table of contents that was checked.

    Raises ValueError as `read_metadata`, and for a file that does not hold what the table says.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.table = read_metadata(folder / ".metadata")
        _check_files(folder, self.table)

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        """The table that was read when the reader was made; the file is not opened again."""
        return self.table


def read_metadata(path: Path) -> Metadata:
    """The table of a checkpoint's `.metadata` file. Megatron's empty `_extra_state` entries, which
    nobody reads, are left out.

    Raises:
        ValueError: the file is missing, is no such table, names a file outside its folder, declares
            a weight as bytes, or boxes that do not cover a tensor exactly.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever
            raise ValueError("it is no file")
        if status.st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        return _metadata(_Tables(io.BytesIO(path.read_bytes())).load())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # an unpickler raises anything on damaged files
        raise ValueError(
            f"{path} is not the metadata of a checkpoint and was not loaded: {error}"
        ) from error


def _check_files(folder: Path, table: Metadata) -> None:
    ends: dict[str, int] = {}  # last byte that the table speaks of, by file
    for name, tensor in table.state_dict_metadata.items():
        for chunk in tensor.chunks:  # type: ignore[union-attr]
            info = table.storage_data.get(MetadataIndex(name, chunk.offsets))
            if info is None:
                raise ValueError(f"{folder} is damaged: {name} has a box that lies in no file")
            file, end = info.relative_path, info.offset + info.length
            ends[file] = max(end, ends.get(file, 0))
    for file, end in ends.items():
        path = folder / file
        found = path.stat().st_size if path.is_file() else 0  # a pipe would wait for ever
        if found < end:
            raise ValueError(
                f"{folder} is damaged: {file} should have {end} bytes, found {found}. "
                "Use an earlier checkpoint"
            )


def check_metadata(path: Path) -> frozenset[str]:
    """The names of a checkpoint's tensors. Raises ValueError as `read_metadata` does."""
    return frozenset(read_metadata(path).state_dict_metadata)


def _metadata(root: Any) -> Metadata:
    state = _state(root, "Metadata")
    tensors = {
        name: _tensor(name, entry)
        for name, entry in state["state_dict_metadata"].items()
        if not (isinstance(entry, _Record) and _is_empty_state(name, entry))
    }
    storage = {}
    for index, info in state["storage_data"].items():
        key, where = _state(index, "MetadataIndex"), _state(info, "StorageInfo")
        if key["fqn"] not in tensors:
            continue
        file = where["relative_path"]
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise ValueError(f"{file!r} is no file of its folder")
        offset, length = _counts((where["offset"], where["length"]))
        storage[MetadataIndex(key["fqn"], torch.Size(_size(key["offset"])))] = _StorageInfo(
            file, offset, length
        )
    return Metadata(tensors, storage_data=storage)  # type: ignore[arg-type]


def _is_empty_state(name: str, entry: _Record) -> bool:
    if entry.kind != "BytesStorageMetadata":
        return False
    if "._extra_state/" not in name:
        raise ValueError(f"{name} is not a tensor")  # torch would unpickle it
    return True


def _tensor(name: str, entry: Any) -> TensorStorageMetadata:
    state = _state(entry, "TensorStorageMetadata")
    properties = state["properties"]
    dtype = properties.state[0] if isinstance(properties, _Record) else None
    if not isinstance(dtype, _Name) or dtype.kind not in _DTYPES:
        raise ValueError(f"{name} has an unknown dtype")
    size = _size(state["size"])
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in state["chunks"]]
    boxes = [(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks]
    _check_cover(name, size, boxes)
    return TensorStorageMetadata(
        TensorProperties(dtype=getattr(torch, dtype.kind)),
        torch.Size(size),
        [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes],
    )


def _check_cover(
    name: str, size: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    """Every element of a tensor lies in exactly one box: a hole would be read as whatever was in
    memory."""
    if any(len(o) != len(size) or len(s) != len(size) for o, s in boxes):
        raise ValueError(f"{name} has a box of other dimensions")
    if len(boxes) > _MOST_BOXES:  # they are compared each with each
        raise ValueError(f"{name} lies in {len(boxes)} boxes, more than {_MOST_BOXES}")
    if sum(math.prod(sizes) for _, sizes in boxes) != math.prod(size):
        raise ValueError(f"{name} is not covered by its {len(boxes)} boxes")
    if not size or len(boxes) == 1 and boxes[0] == ((0,) * len(size), size):
        return
    begin = np.array([offsets for offsets, _ in boxes], dtype=np.int64)  # [boxes, dimensions]
    end = begin + np.array([sizes for _, sizes in boxes], dtype=np.int64)
    if (end > np.array(size)).any():
        raise ValueError(f"{name} has a box that reaches out of it")
    for index in range(len(boxes) - 1):
        meets = (begin[index] < end[index + 1 :]) & (begin[index + 1 :] < end[index])
        if meets.all(axis=1).any():
            raise ValueError(f"{name} has boxes that overlap")


def _state(record: Any, kind: str) -> dict[str, Any]:
    if not isinstance(record, _Record) or record.kind != kind or not isinstance(record.state, dict):
        raise ValueError(f"it has something else in the place of a {kind}")
    return record.state


def _size(value: Any) -> tuple[int, ...]:
    """A `torch.Size`: made from one tuple of numbers."""
    if not isinstance(value, _Record) or value.kind != "Size" or len(value.arguments) != 1:
        raise ValueError("it has something else in the place of a size")
    return _counts(value.arguments[0])


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or any(type(v) is not int or v < 0 for v in values):
        raise ValueError(f"{values!r} are no sizes")
    if any(v >= 2**62 for v in values):
        raise ValueError("it has a size that no memory holds")
    return tuple(values)
