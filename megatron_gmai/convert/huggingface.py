"""Hugging Face checkpoints in and out: the functions that the rest of the project uses."""

from megatron_gmai.convert.read import (
    Pretrained,
    check_tokenizer,
    existing_folder,
    is_hugging_face,
    open_pretrained,
    open_separate,
    open_start,
)
from megatron_gmai.convert.write import write_pretrained

__all__ = [
    "Pretrained",
    "check_tokenizer",
    "existing_folder",
    "is_hugging_face",
    "open_pretrained",
    "open_separate",
    "open_start",
    "write_pretrained",
]
