"""What a training checkpoint carries along without running it: CLIP's last layer and final norm.

Training never reads these tensors, but an export without them would not be the CLIP that it began
with. They lie in the checkpoint folder as one more file, whatever the layout.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_gmai.config import ModelConfig
from megatron_gmai.convert.mapping import leftover_shapes
from megatron_gmai.convert.safetensors_file import write_safetensors

CARRIED = "carried.safetensors"


def write_carried(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors into a checkpoint folder before its manifest is written; none, no file."""
    if tensors:
        dtypes = {tensor.dtype for tensor in tensors.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # which holds the others
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        write_safetensors(folder / CARRIED, shapes, dtype, tensors.values())


def read_carried(folder: Path, model: ModelConfig) -> dict[str, Tensor]:
    """The tensors that a checkpoint carries; none if it carries nothing.

    Raises ValueError if the file is damaged or belongs to another model.
    """
    path = folder / CARRIED
    if not path.is_file():
        return {}
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != leftover_shapes(model):
        raise ValueError(f"{path} does not belong to this model: it holds other tensors or shapes")
    return tensors
