"""One place chooses where a run computes, with how many threads, and in which groups."""

import ctypes
import dataclasses
import glob
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron_gmai.config import ParallelConfig
from megatron_gmai.runtime import cpu
from megatron_gmai.runtime.device import choose_device, peak_memory_bytes, threads_per_process
from megatron_gmai.runtime.groups import build_groups, destroy_groups, initialize_distributed


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These tests are about a machine without a GPU, wherever they run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(glob, "glob", lambda pattern: [])
    monkeypatch.setattr(shutil, "which", lambda program: None)
    for name in [n for n in os.environ if n.startswith("SLURM_") or n == "CUDA_VISIBLE_DEVICES"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    yield
    cpu.uninstall()


@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_without_a_gpu_it_is_the_cpu_with_gloo_in_fp32(asked: str) -> None:
    device = choose_device(asked)
    assert dataclasses.astuple(device) == ("cpu", torch.device("cpu"), "gloo", torch.float32)
    assert cpu.installed()
    assert not device.is_cuda


def test_choosing_again_gives_the_same() -> None:
    assert choose_device("auto") == choose_device("auto")


def test_bf16_can_be_asked_for_on_a_cpu() -> None:
    assert choose_device("cpu", "bf16").dtype is torch.bfloat16


def test_asking_for_a_gpu_that_is_not_there_is_told_and_changes_nothing() -> None:
    with pytest.raises(ValueError, match="--device cuda: torch sees no GPU: this machine has none"):
        choose_device("cuda")
    assert not cpu.installed()


@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_without_a_sign_of_a_gpu_nothing_is_said(
    asked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    choose_device(asked)
    assert capsys.readouterr().err == ""


def no_driver() -> None:
    raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check that ...")


def sign(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Plant one sign of a GPU."""
    if kind == "build":
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    elif kind == "file":
        monkeypatch.setattr(glob, "glob", lambda p: ["/dev/nvidia0"] if "nvidia" in p else [])
    elif kind == "program":
        monkeypatch.setattr(shutil, "which", lambda program: "/usr/bin/nvidia-smi")
    else:
        monkeypatch.setenv(*kind.split("="))


@pytest.mark.parametrize(
    ("signs", "told"),
    [
        (["SLURM_GPUS_ON_NODE=8"], r"SLURM_GPUS_ON_NODE=8\), but torch .* is built for the CPU"),
        (["CUDA_VISIBLE_DEVICES=0,1"], "CUDA_VISIBLE_DEVICES=0,1 names GPUs, but torch .* for the"),
        (
            ["file"],
            r"the machine has GPUs \(/dev/nvidia0\), but torch .* is built for the CPU only",
        ),
        (["program"], r"driver is installed \(/usr/bin/nvidia-smi\), but torch .* the CPU only"),
        (["build"], "torch is built for CUDA 13.0, but: Found no NVIDIA driver on your system.$"),
        (["build", "file"], r"\(/dev/nvidia0\), but: Found no NVIDIA driver on your system.$"),
        (["build", "CUDA_VISIBLE_DEVICES="], "CUDA_VISIBLE_DEVICES='' hides every GPU"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_a_gpu_that_cannot_be_used_is_told_in_one_line(
    signs: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    for kind in signs:
        sign(monkeypatch, kind)
    with pytest.raises(ValueError, match="--device cuda: torch sees no GPU: "):
        choose_device("cuda")
    assert choose_device("auto").kind == "cpu"
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^note: --device auto takes the CPU: .*{told}", line)


def test_one_process_of_a_machine_tells_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    sign(monkeypatch, "file")
    choose_device("auto")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["SLURM_GPUS=0", "CUDA_VISIBLE_DEVICES="])
def test_a_job_without_gpus_expects_none(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sign(monkeypatch, kind)
    choose_device("auto")
    assert capsys.readouterr().err == ""


def test_torchs_search_for_cuda_is_not_reported() -> None:
    """In a process of its own: the warning comes when the module is first loaded."""
    program = """
import logging
from megatron_gmai.runtime.quiet import quiet_libraries
quiet_libraries()
import torch.utils.cpp_extension
torch.utils.cpp_extension.logger.warning("No CUDA runtime is found")
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert done.stderr == b""


def test_fp16_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="--dtype fp16 needs a GPU"):
        choose_device("cpu", "fp16")
    assert not cpu.installed()


@pytest.mark.parametrize(("ranks", "threads"), [("1", 8), ("3", 2), ("8", 1), ("20", 1)])
def test_ranks_of_a_machine_share_its_cores(
    ranks: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert threads_per_process() == threads


def test_the_chosen_number_of_threads_is_set() -> None:
    choose_device("cpu")
    assert torch.get_num_threads() == 1


def test_peak_memory_is_at_least_what_is_held_now() -> None:
    held = torch.ones(16 * 2**20)
    assert peak_memory_bytes(choose_device("cpu")) > held.nbytes


def test_without_torchrun_a_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    initialize_distributed(choose_device("cpu"), timeout_minutes=1)
    groups = build_groups(ParallelConfig(), num_layers=4, timeout_minutes=1)
    assert [g.size() for g in (groups.tp, groups.pp, groups.dp, groups.dp_cp, groups.solo)] == [
        1
    ] * 5
    assert groups.for_vision().tp is groups.solo
    destroy_groups()
    assert not dist.is_initialized()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc only")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    """In a process of its own: other tests have made the setting in this one."""
    program = """
import ctypes, resource
from megatron_gmai.runtime.device import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
def faults(size=24 << 20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(size))
    libc.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), faults())
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    first, second = map(int, done.stdout.split())
    assert first > 5000 and second < 100  # 24 MiB are 6144 pages
