"""A dispatch mode that sees what the package's operators do inside, instead of seeing them."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from gmai_kernels.ops import IMPLEMENTATIONS


class InsideMode(TorchDispatchMode):
    """Calls `operation` for every torch operation, those around a kernel's launch included.

    A plain mode is off while an operator that it has been shown runs, so it would miss the
    launcher's allocations and sums.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.name() not in IMPLEMENTATIONS:
            return self.operation(func, args, kwargs)
        with self:
            return IMPLEMENTATIONS[func.name()](*args, **kwargs)

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError
