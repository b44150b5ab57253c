"""GPUs and networks: what the planner knows about them, and where the figures come from.

Peak: dense bf16 by the vendor. `attainable`: the share of it that large matrix products reach in
practice; the rest of the plan's time comes from the model, not from this table. Bandwidths are one
direction, of one GPU. `memory_gib` leaves the driver, NCCL and fragmentation their part.

| GPU | figures |
|---|---|
| A100 | NVIDIA A100 datasheet (312 TFLOP/s; 1,555, 2,039 GB/s; NVLink 600 GB/s); HDR InfiniBand |
| H100 | NVIDIA H100 SXM datasheet (989 TFLOP/s; 3,350 GB/s; NVLink 900 GB/s); NDR InfiniBand |
| H200 | NVIDIA H200 SXM datasheet (989 TFLOP/s; 141 GB, 4,800 GB/s; NVLink 900 GB/s) |
| B200 | NVIDIA HGX B200 datasheet (2,250 TFLOP/s; 180 GB, 7,700 GB/s; NVLink 1,800 GB/s) |

The attainable shares are assumptions, chosen once so that the prediction for Megatron-LM's 7.1B
model on H100s is its published 47 % (docs/planning.md); nothing here was measured by this project.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of `per_node`, its node in a network."""

    name: str
    memory_gib: float  # for tensors
    peak_tflops: float
    attainable: float
    memory_gb_s: float
    nvlink_gb_s: float
    network_gb_s: float
    per_node: int = 8

    @property
    def peak_flops(self) -> float:
        """Peak bf16 operations a second."""
        return self.peak_tflops * 1e12

    @property
    def product_flops(self) -> float:
        """Floating-point operations a second of large matrix products."""
        return self.peak_flops * self.attainable


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 36.5, 312, 0.65, 1555, 300, 25),
        Gpu("a100-80gb", 74, 312, 0.65, 2039, 300, 25),
        Gpu("h100-80gb", 74, 989, 0.62, 3350, 450, 50),
        Gpu("h200", 133, 989, 0.62, 4800, 450, 50),
        Gpu("b200", 170, 2250, 0.58, 7700, 900, 50),
    )
}

# Names that drivers report, longest first, for `gpu_of_driver`.
_DRIVER_NAMES = {"B200": "b200", "H200": "h200", "H100": "h100-80gb", "A100": "a100-80gb"}


def gpu_called(name: str) -> Gpu:
    """The GPU of the table. Raises ValueError for an unknown name."""
    if name not in GPUS:
        raise ValueError(f"--gpu {name}: unknown; choose from {', '.join(GPUS)}")
    return GPUS[name]


def gpu_of_driver(driver_name: str) -> Gpu | None:
    """The GPU by the name that its driver reports; None for one not known."""
    for part, name in _DRIVER_NAMES.items():
        if part in driver_name and "PCIe" not in driver_name and "NVL" not in driver_name:
            return GPUS[name]
    return None


def device_peak(driver_name: str) -> float | None:
    """Peak bf16 operations a second of a device by its driver's name; None for one not known."""
    gpu = gpu_of_driver(driver_name)
    return None if gpu is None else gpu.peak_tflops * 1e12
