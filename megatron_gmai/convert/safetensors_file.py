"""Safetensors files written one tensor at a time; the library's own writer takes them all at once.

Format (https://github.com/huggingface/safetensors): the header's length as 8 bytes, little-endian;
a JSON header padded with spaces; the bytes of all tensors, one after the other.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_gmai.convert.disk_file import DiskFile
from megatron_gmai.convert.files import SAFETENSORS_DTYPES, cast
from megatron_gmai.convert.output import Advance, not_counted

_SPELLINGS = {dtype: spelled for spelled, dtype in SAFETENSORS_DTYPES.items()}


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[Tensor],
    advance: Advance = not_counted,
) -> None:
    """Write `tensors`, which come in the order of `shapes`, cast to `dtype`.

    Only one tensor is in memory at a time. The file's mode follows the umask.

    Raises ValueError where `dtype` cannot hold a number of a tensor.
    """
    assert sys.byteorder == "little"
    with DiskFile(path) as file:
        file.write(_header(shapes, dtype))
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert tuple(tensor.shape) == shape, (name, tensor.shape, shape)
            flat = cast(name, tensor.detach().cpu(), dtype).contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)
            advance(flat.nbytes)


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _SPELLINGS[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the file: tensors start at an aligned place
    return len(text).to_bytes(8, "little") + text
