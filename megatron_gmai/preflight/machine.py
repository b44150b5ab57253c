"""Versions, driver and devices of one process."""

import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from megatron_gmai.preflight.check import FAIL, PASS, WARN, Check
from megatron_gmai.runtime.device import Device
from megatron_gmai.runtime.environment import driver_cuda

# package -> lowest and first too high version that this code is tested with
TESTED = {"torch": ((2, 10), (2, 14)), "megatron-core": ((0, 16), (0, 20))}
FREE_MEMORY = 0.9  # share of a GPU that must be free: less means that another process uses it
SHARED_MEMORY = 2**30  # bytes; loader processes hand their pixels over in it
GPU_FILE = Path("/dev/nvidia0")


def versions() -> Iterator[Check]:
    """Python and the packages whose versions decide."""
    python = tuple(map(int, platform.python_version_tuple()[:2]))
    status = PASS if python >= (3, 11) else FAIL
    yield Check("python", status, platform.python_version(), "use Python 3.11 or newer")
    for package, (low, high) in TESTED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            yield Check(package, FAIL, "not installed", "pip install -e . in this environment")
            continue
        tested = low <= _numbers(found) < high
        span = f"{low[0]}.{low[1]} to below {high[0]}.{high[1]}"
        yield Check(package, PASS if tested else WARN, found, f"tested: {span}")


def _numbers(text: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13)."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in text.split(".")[:2])


def driver(device: Device) -> Iterator[Check]:
    """Whether torch's build and the machine's driver fit each other."""
    name, build = "driver and torch", torch.version.cuda
    if build is None:
        if GPU_FILE.exists():
            remedy = "install torch's CUDA build: this one cannot use the GPU of this machine"
            yield Check(name, FAIL if device.is_cuda else WARN, "a CPU build beside a GPU", remedy)
        else:
            yield Check(name, PASS, "a CPU build, no GPU")
    elif not torch.cuda.is_available():
        remedy = "mend the driver, or give the job GPUs" if GPU_FILE.exists() else "ask for GPUs"
        yield Check(name, WARN, f"built for CUDA {build}, no usable GPU", remedy)
    else:
        yield _driver_fits(name, driver_cuda(), build)


def _driver_fits(name: str, newest: str, build: str) -> Check:
    """A driver runs builds of its own major version, and of earlier ones."""
    detail = f"driver for CUDA {newest}, torch built for {build}"
    if _numbers(newest)[0] < _numbers(build)[0]:
        return Check(name, FAIL, detail, f"update the driver, or use a torch for CUDA {newest}")
    if _numbers(newest) < _numbers(build):
        return Check(
            name, WARN, detail, "kernels compiled at run time (Triton) may need a newer one"
        )
    return Check(name, PASS, detail)


def device_memory(device: Device) -> Iterator[Check]:
    """What this process computes on, and whether it has it for itself."""
    if not device.is_cuda:
        yield Check("device", PASS, f"CPU, {torch.get_num_threads()} thread(s) a process")
        return
    free, total = torch.cuda.mem_get_info(device.torch_device)
    detail = f"{torch.cuda.get_device_name(device.torch_device)}, {free / 2**30:.0f} of "
    detail += f"{total / 2**30:.0f} GiB free"
    status = PASS if free > FREE_MEMORY * total else WARN
    yield Check("device", status, detail, "end the processes that nvidia-smi shows")


def shared_memory() -> Iterator[Check]:
    """Containers often get 64 MiB only; then loader processes die with a bus error."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    status = PASS if free >= SHARED_MEMORY else FAIL
    remedy = "start the container with --ipc=host or --shm-size=16g, or give --num-workers 0"
    yield Check("shared memory", status, f"{free / 2**30:.1f} GiB free in {folder}", remedy)
