"""Hugging Face checkpoints in and out: the two functions that the rest of the project uses."""

from megatron_gmai.convert.read import Pretrained, open_pretrained
from megatron_gmai.convert.write import write_pretrained

__all__ = ["Pretrained", "open_pretrained", "write_pretrained"]
