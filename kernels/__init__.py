"""Fused ops of the trainer: Triton kernels on a GPU, a chunked torch path elsewhere.

Imported as `gmai_kernels`; README.md beside this file has the formulas, the traffic and the
figures.
"""

from gmai_kernels.cross_entropy import vocab_parallel_cross_entropy
from gmai_kernels.dispatch import Implementation, use_implementation
from gmai_kernels.linear_cross_entropy import linear_cross_entropy
from gmai_kernels.rms_norm import rms_norm

__all__ = [
    "Implementation",
    "linear_cross_entropy",
    "rms_norm",
    "use_implementation",
    "vocab_parallel_cross_entropy",
]
