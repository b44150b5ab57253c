"""One place chooses where a run computes, with how many threads, and in which groups."""

import dataclasses
import os
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
    with pytest.raises(ValueError, match="--device cuda: torch sees no GPU. Use --device cpu"):
        choose_device("cuda")
    assert not cpu.installed()


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
