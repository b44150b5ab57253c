"""Lines that tell how far a long job is: counts, bytes, speed and time left."""

import time
from collections.abc import Callable

INTERVAL_S = 5.0


class Progress:
    """Counts items and bytes of one phase after another, and says so every few seconds."""

    def __init__(self, *tell: Callable[[str], None]) -> None:
        """`tell` are what takes each line: the terminal, the file for those who wait."""
        self._tell = tell
        self.begin("", 0)

    def begin(self, phase: str, items: int, size: int = 0) -> None:
        """`items` and `size` in bytes (0: not known) are those of the whole phase."""
        self._phase, self._items, self._size = phase, items, size
        self._start = self._last = time.monotonic()

    def __call__(self, items: int, size: int) -> None:
        """So many are done."""
        now = time.monotonic()
        if now - self._last < INTERVAL_S:
            return
        self._last = now
        for tell in self._tell:
            tell(self._line(items, size, now - self._start))

    def _line(self, items: int, size: int, seconds: float) -> str:
        done, total = (size, self._size) if self._size else (items, self._items)
        left = seconds * (total - done) / done if 0 < done < total else 0.0
        parts = [f"{items} of {self._items}" if self._items else f"{items}"]
        if size:
            total_size = f" of {self._size / 1e6:.0f}" if self._size else ""
            parts.append(f"{size / 1e6:.0f}{total_size} MB, {size / 1e6 / seconds:.1f} MB/s")
        parts += [f"{items / seconds:.0f}/s", f"{left:.0f} s left"]
        return f"{self._phase}: {', '.join(parts)}"
