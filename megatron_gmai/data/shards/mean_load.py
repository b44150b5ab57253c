"""What a pack of a data set holds on average, before a run packs anything."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_gmai.config import DataConfig
from megatron_gmai.data.plan.windows import LENGTH_ROW, PlanSettings, Windows
from megatron_gmai.data.shards.reader import Shards

TEXT = 96  # tokens of a sample beside its images, where no table of lengths has been made yet


class PackMeans(NamedTuple):
    """Of one pack, but for the last."""

    images: float
    samples: float
    fill: float  # share of its tokens that belong to samples
    epoch_samples: float  # of one pass over the data, their ratios counted


def pack_means(folder: Path, data: DataConfig) -> PackMeans:
    """Means over the packs of the first window of the plan, packed as a run does.

    Raises ValueError for shards that cannot be read, or have no table of lengths.
    """
    shards = Shards(folder)
    measured = _newest_lengths(shards)
    if measured is None or len(shards) == 0:
        raise ValueError(f"{folder} has no token lengths: tools/make_shards.py measures them")
    lengths = measured.astype(LENGTH_ROW)
    lengths[lengths["length"] > data.max_length] = 0  # measured for longer packs
    ratios = [source.sample_ratio for source in shards.manifest.sources]
    images, sources = shards.rows["images"], shards.rows["source"]
    settings = PlanSettings(
        0, data.max_length, data.dset_pack_level, max_images=data.max_images_per_pack
    )
    first_rows = shards.first_rows
    windows = Windows(lengths, first_rows, sources[first_rows[:-1]], ratios, settings, images)
    packs = windows.plan(0, 0)
    if len(packs) == 0:
        raise ValueError(f"{folder} has no sample of at most {data.max_length} tokens")
    begun = packs.samples[packs.starts == 0]
    tokens = int((packs.stops - packs.starts).sum())
    return PackMeans(
        images=float(images[begun].sum() / len(packs)),
        samples=len(begun) / len(packs),
        fill=tokens / (len(packs) * data.max_length),
        epoch_samples=float(np.array(ratios)[sources].sum()),
    )


def images_per_pack(folder: Path, tokens_per_image: int, max_length: int) -> float:
    """Mean images of full packs, samples weighted by their data set's ratio.

    Raises ValueError for shards that cannot be read.
    """
    shards = Shards(folder)
    if len(shards) == 0:
        return 0.0
    ratios = np.array([source.sample_ratio for source in shards.manifest.sources])
    weight = ratios[shards.rows["source"]]
    images = np.average(shards.rows["images"], weights=weight)
    measured = _newest_lengths(shards)
    if measured is None:
        tokens = images * tokens_per_image + TEXT
    else:
        tokens = np.average(measured["length"], weights=weight)
    return float(max_length * images / max(1.0, tokens))


def _newest_lengths(shards: Shards) -> np.ndarray | None:
    """The table of lengths made last, if there is one for these shards."""
    tables = sorted(shards.folder.glob("lengths-*.npy"), key=lambda path: path.stat().st_mtime)
    table = np.load(tables[-1], mmap_mode="r") if tables else None
    return table if table is not None and len(table) == len(shards) else None
