"""A vocabulary split over tensor-parallel ranks: where a label lies, how the ranks' sums join.

Legend: T tokens, V columns held by this rank, N of them true vocabulary (the rest is padding), W
ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

AllGather = Callable[[Tensor], Tensor]  # [T, 3] -> [W, T, 3]

ELSEWHERE = -1  # target of a token whose label another rank holds
IGNORED = -2  # target of a token without a label


def local_targets(labels: Tensor, vocab_start: int, columns: int, ignore_index: int) -> Tensor:
    """Return int64 [T]: each label's column on this rank, or ELSEWHERE, or IGNORED."""
    local = labels - vocab_start
    held = torch.where((local >= 0) & (local < columns), local, ELSEWHERE)
    return torch.where(labels == ignore_index, IGNORED, held)


def true_columns(columns: int, vocab_start: int, vocab_size: int) -> int:
    """Return how many of this rank's columns are true vocabulary (0 for a slice of padding)."""
    return max(0, min(columns, vocab_size - vocab_start))


def combine(stats: Tensor, all_gather: AllGather | None) -> tuple[Tensor, Tensor]:
    """Return (log-sum-exp [T], label logit [T]) over all ranks' columns from one rank's `stats`."""
    joined = stats[None] if all_gather is None else all_gather(stats)  # [W, T, 3]
    if joined.dim() != 3 or joined.shape[1:] != stats.shape:
        raise ValueError(
            f"all_gather: returned shape {tuple(joined.shape)}; "
            f"expected [ranks, {stats.shape[0]}, 3]"
        )
    maximum, total, label_logit = joined.unbind(-1)
    peak = maximum.amax(0)
    lse = peak + (total * torch.exp(maximum - peak)).sum(0).log()
    return lse, label_logit.sum(0)


def check_labels(
    labels: Tensor, tokens: int, vocab_size: int, ignore_index: int, device: torch.device
) -> None:
    """Raise ValueError unless `labels` is int64 [T], in the vocabulary or `ignore_index`.

    Labels on a GPU are checked there, as reading them would wait for all work before them: a wrong
    one then stops the process at a later call, with "labels: a value lies outside ...".
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: dtype {labels.dtype} is not int64; call .long()")
    if tuple(labels.shape) != (tokens,):
        raise ValueError(
            f"labels: shape {tuple(labels.shape)} does not match; expected ({tokens},)"
        )
    if labels.device not in (device, torch.device("cpu")):
        raise ValueError(f"labels: device {labels.device} is neither {device} nor cpu; move them")
    outside = f"outside the vocabulary [0, {vocab_size})"
    remedy = f"fix the tokenizer, or mark unsupervised tokens with ignore_index={ignore_index}"
    used = labels.masked_fill(labels == ignore_index, 0)
    if not readable(labels):
        within = ((used >= 0) & (used < vocab_size)).all()
        torch._assert_async(within, f"labels: a value lies {outside}; {remedy}")
        return
    low, high = torch.stack(used.aminmax()).tolist()
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"labels: value {wrong} lies {outside}; {remedy}")


def readable(tensor: Tensor) -> bool:
    """Whether values can be read without waiting: real ones in host memory.

    Fake tensors (a dry run, torch.compile) have none.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return detect_fake_mode((tensor,)) is None


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return `values` on `device` without a wait, also if they were made on the host: the driver
    copies page-locked memory behind the work before it, and may wait for that work with any other.
    """
    if device.type == "cuda" and readable(values):
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def check_vocabulary(columns: int, vocab_start: int, vocab_size: int | None, gathered: bool) -> int:
    """Return the true global vocabulary size; raise ValueError where the slice contradicts it."""
    if vocab_start < 0:
        raise ValueError(
            f"vocab_start: {vocab_start} is negative; pass this rank's first global column"
        )
    if vocab_size is None:
        if gathered or vocab_start:
            raise ValueError(
                "vocab_size: needed when the vocabulary is split; pass the global unpadded size"
            )
        return columns
    if vocab_size < 1:
        raise ValueError(f"vocab_size: {vocab_size} is not positive; pass the global unpadded size")
    held = f"columns [{vocab_start}, {vocab_start + columns})"
    if not gathered and (vocab_start or columns < vocab_size):
        raise ValueError(
            f"all_gather: this rank holds {held} of {vocab_size}; "
            "pass the collective that joins the ranks"
        )
    return vocab_size
