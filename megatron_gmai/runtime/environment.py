"""What a run runs on: versions, devices, hosts. Kept beside the run, one line for each start."""

import json
import os
import platform
import socket
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("torch", "megatron-core", "triton", "numpy", "pillow", "webdataset", "sentencepiece"),
    *("transformers", "transformer-engine", "flash-attn"),
)
STARTS_FILE = "environment.jsonl"


def describe_environment() -> dict[str, Any]:
    """Flat and JSON-able. Versions of packages that are not installed are left out."""
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["torch_cuda"] = torch.version.cuda
    count = torch.cuda.device_count()
    if count:
        found["gpus"] = f"{count} x {torch.cuda.get_device_name(0)}"
        found["driver_cuda"] = driver_cuda()
    found |= {name: os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST")
              if name in os.environ}  # fmt: skip
    return found


def driver_cuda() -> str:
    """The newest CUDA that the driver runs, `12.8`. Needs a CUDA build of torch."""
    number: int = getattr(torch._C, "_cuda_getDriverVersion")()  # noqa: B009  (not in CPU builds)
    return f"{number // 1000}.{number % 1000 // 10}"  # 12080 -> 12.8


def record_start(work_dir: Path, processes: int) -> None:
    """Append this start to `WORK_DIR/environment.jsonl`; called on one rank."""
    line = {"time": round(time.time(), 1), "processes": processes, **describe_environment()}
    with (work_dir / STARTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
