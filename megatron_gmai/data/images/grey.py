"""Grey values of more than 8 bits, as readers find them, and the window that they are shown in."""

from dataclasses import dataclass, replace

import numpy as np

from megatron_gmai.data.images.orientation import turn
from megatron_gmai.data.images.window import percentile_window, value_range, window_to_8_bits

Window = tuple[float, float]  # lower and upper end


@dataclass(frozen=True)
class Grey:
    """Values [h, w] of any depth. `file_window` is the one that the file names, if it does."""

    values: np.ndarray
    file_window: Window | None = None
    inverted: bool = False  # the smallest value is white

    @property
    def window(self) -> Window:
        """The one that training shows the values in."""
        return self.file_window or percentile_window(self.values)

    @property
    def range(self) -> Window:
        """Smallest and largest value."""
        return value_range(self.values)

    def levels(self, window: Window | None = None) -> np.ndarray:
        """uint8 [h, w], in another window if one is given."""
        levels = window_to_8_bits(self.values, window or self.file_window)
        return 255 - levels if self.inverted else levels

    def turned(self, orientation: int) -> "Grey":
        """Upright, by EXIF's orientation."""
        return replace(self, values=turn(self.values, orientation))


Picture = np.ndarray | Grey  # uint8 [h, w] or [h, w, 3], or values that have yet to be windowed
