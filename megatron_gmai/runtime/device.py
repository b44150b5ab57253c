"""Where a run computes: the one place that chooses between CPU with gloo and CUDA with NCCL."""

import ctypes
import glob
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_gmai.runtime import cpu

HIDING = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES; Slurm sets the last
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Device:
    """The device of this process and what follows from it."""

    kind: str  # "cpu" or "cuda"
    torch_device: torch.device
    backend: str  # of torch.distributed
    dtype: torch.dtype  # of parameters and activations

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"


def choose_device(device: str = "auto", dtype: str = "auto") -> Device:
    """Resolve `--device` and `--dtype` for this process and prepare torch for them.

    On CPU this installs the emulation of `torch.cuda` that Megatron-Core needs; on CUDA it selects
    the GPU of the local rank and touches nothing else. Where `auto` takes the CPU although a GPU
    could be expected, one process of each machine says why on stderr.

    Raises:
        ValueError: `cuda` is asked for and no GPU is visible, or fp16 on CPU.
    """
    available = torch.cuda.is_available() and not cpu.installed()
    kind = ("cuda" if available else "cpu") if device == "auto" else device
    reason = None if available or cpu.installed() else why_no_gpu()
    if kind == "cuda" and not available:
        raise ValueError(
            f"--device cuda: torch sees no GPU: {reason or 'this machine has none'}. "
            "Mend that (docs/gpu.md), or use --device cpu."
        )
    if kind == "cpu" and dtype == "fp16":
        raise ValueError("--dtype fp16 needs a GPU. Use --dtype fp32 or bf16 on a CPU.")
    name = ("bf16" if kind == "cuda" else "fp32") if dtype == "auto" else dtype
    if kind == "cuda":
        index = local_rank() % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return Device("cuda", torch.device("cuda", index), "nccl", DTYPES[name])
    if device == "auto" and reason and local_rank() == 0:
        print(f"note: --device auto takes the CPU: {reason}", file=sys.stderr, flush=True)
    cpu.install()
    keep_freed_memory()
    torch.set_num_threads(threads_per_process())
    return Device("cpu", torch.device("cpu"), "gloo", DTYPES[name])


def use_device(device: Device) -> None:
    """For a new thread: torch begins each with the machine's first GPU, and a context of every
    process there, half a gigabyte each, would come with the first call that asks for a stream."""
    if device.is_cuda:
        torch.cuda.set_device(device.torch_device)


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory of freed tensors, as torch's allocator does on a GPU.

    It gives it back to the system otherwise, and every step takes the same pages anew, zeroed: up
    to a tenth of a training step. Blocks above 32 MiB, glibc's limit, still have pages of their own
    that go with them. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)  # the heap never shrinks
        mallopt(M_MMAP_THRESHOLD, 32 << 20)


def why_no_gpu() -> str | None:
    """Why torch sees no GPU where one could be expected; None where none could be.

    A GPU is expected by a build of torch for GPUs, and where the job or the machine has one.
    """
    build = _gpu_build()
    sign = next(_signs_of_gpus(), None)
    if build is None:
        return sign and f"{sign}, but torch {torch.__version__} is built for the CPU only"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in HIDING:
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU"
    try:
        torch.cuda.init()
        fault = "torch.cuda.is_available() is False"
    except (RuntimeError, AssertionError) as error:
        fault = str(error).strip().splitlines()[0]
    return f"{sign or f'torch is built for {build}'}, but: {fault}"


def _gpu_build() -> str | None:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else None


def _signs_of_gpus() -> Iterator[str]:
    """What tells that this job or machine has GPUs, the most telling first."""
    for name, value in sorted(os.environ.items()):
        if name.startswith("SLURM_") and "GPUS" in name and value not in ("", "0"):
            yield f"the job has GPUs ({name}={value})"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible not in HIDING:
        yield f"CUDA_VISIBLE_DEVICES={visible} names GPUs"
    for files in ("/dev/nvidia[0-9]*", "/dev/kfd"):  # NVIDIA's and AMD's drivers
        if found := sorted(glob.glob(files)):
            yield f"the machine has GPUs ({found[0]})"
    if program := shutil.which("nvidia-smi"):
        yield f"NVIDIA's driver is installed ({program})"


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def threads_per_process() -> int:
    """Cores of this machine shared evenly by its ranks, at least one each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def device_name(device: Device) -> str:
    """The GPU's name by its driver; "cpu" without one."""
    return torch.cuda.get_device_name(device.torch_device) if device.is_cuda else device.kind


def peak_memory_bytes(device: Device) -> int:
    """Peak device memory of this process; on CPU the peak resident set."""
    if device.is_cuda:
        return torch.cuda.max_memory_allocated(device.torch_device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
