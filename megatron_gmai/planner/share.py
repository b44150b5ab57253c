"""One rank's part of a micro-batch, and of a step's images."""

import math
from dataclasses import dataclass

from megatron_gmai.config import Config
from megatron_gmai.layout import ImageShare, Layout
from megatron_gmai.planner.cost import Load

HALF, SINGLE = 2, 4  # bytes


@dataclass(frozen=True)
class Share:
    """What a rank of `layout` has of packs that hold `load`."""

    config: Config
    load: Load
    layout: Layout

    @property
    def tokens(self) -> int:  # s
        return self.config.train.micro_batch_size * self.load.length // self.layout.context

    @property
    def scattered(self) -> int:
        """By how much norms and residuals are divided over the TP ranks."""
        return self.layout.tensor if self.config.parallel.sequence_parallel else 1

    @property
    def images(self) -> int:
        """Images whose features this rank contributes to a micro-batch, blanks included."""
        return ImageShare(0, self.layout.tensor * self.layout.context).length(self.all_images)

    @property
    def all_images(self) -> int:
        """Images of a micro-batch."""
        return math.ceil(self.load.images * self.config.train.micro_batch_size)

    @property
    def step_images(self) -> int:
        """Images that this rank encodes for a step with `--vision-phase all-ranks`."""
        train = self.config.train
        packs = self.layout.micro_batches(train) * train.micro_batch_size
        return ImageShare(0, self.layout.model).length(math.ceil(self.load.images * packs))
