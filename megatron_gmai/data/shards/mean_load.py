"""How many images a pack of a data set holds, before anything is packed."""

from pathlib import Path

import numpy as np

from megatron_gmai.data.shards.reader import Shards

TEXT = 96  # tokens of a sample beside its images, where no table of lengths has been made yet


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
    tables = sorted(shards.folder.glob("lengths-*.npy"))
    lengths = np.load(tables[-1], mmap_mode="r")["length"] if tables else None
    if lengths is None or len(lengths) != len(shards):
        tokens = images * tokens_per_image + TEXT
    else:
        tokens = np.average(lengths, weights=weight)
    return float(max_length * images / max(1.0, tokens))
