"""What to tell when a micro-batch does not fit into the device's memory."""

from megatron_gmai.data.loading.batch import MicroBatch

_MOST_NAMED = 32  # samples and lengths: a pack of short texts has hundreds


class OutOfMemory(ValueError):
    """A micro-batch that is too large for the settings."""


def out_of_memory(batch: MicroBatch | None, rank: int, error: Exception) -> OutOfMemory:
    """The error to raise in place of torch's, naming the micro-batch that was drawn last.

    (Under pipeline parallelism earlier ones are still in memory as well.)
    """
    reason = str(error).splitlines()[0] if str(error) else "no reason given"
    drawn = "before any micro-batch was drawn" if batch is None else f"with {describe(batch)}"
    return OutOfMemory(
        f"rank {rank} ran out of memory {drawn}.\n{reason}\n"
        "Lower --micro-batch-size, --max-length or --vit-micro-batch-size, bound the images with "
        "--max-images-per-pack, recompute activations (--recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1), or use more --tp or --pp."
    )


def describe(batch: MicroBatch) -> str:
    """Sizes of a micro-batch, lengths of its segments in tokens, keys of its samples."""
    lengths = batch.cu_seqlens.diff().tolist()
    return (
        f"a micro-batch of {batch.num_samples} samples, {batch.image_starts.numel()} images and "
        f"{batch.tokens.numel()} tokens, in segments of {_listed(lengths)} tokens (padding is one "
        f"too); samples: {_listed(batch.keys)}"
    )


def _listed(values: list[int] | tuple[str, ...]) -> str:
    more = len(values) - _MOST_NAMED
    text = ", ".join(map(str, values[:_MOST_NAMED]))
    return f"{text} and {more} more" if more > 0 else text
