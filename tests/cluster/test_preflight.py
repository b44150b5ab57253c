"""Preflight: what is right passes, what is broken is named with its remedy."""

import dataclasses
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_gmai.cli import parse
from megatron_gmai.preflight import collectives, machine, memory, storage
from megatron_gmai.preflight.check import FAIL, PASS, WARN, Check, merge, table
from megatron_gmai.preflight.first import first_checks
from megatron_gmai.preflight.settings import settings
from megatron_gmai.presets import preset
from megatron_gmai.runtime.device import Device
from megatron_gmai.training.checkpoint import open_checkpoint
from tests.training.command import finish, launcher, run, trained

Usage = namedtuple("Usage", "total used free")


def preflight(shards: Path, work_dir: Path, ranks: int, *flags: str) -> tuple[int, str]:
    words = [*launcher(ranks), "tools/preflight.py", "--preset", "gmai-vl-tiny", "--device", "cpu"]
    process = run([*words, "--shards", str(shards), "--work-dir", str(work_dir), *flags])
    output = finish(process)
    return process.returncode, output


def test_a_sound_machine_passes_with_every_collective_of_the_layout(
    shards: Path, tmp_path: Path
) -> None:
    status, output = preflight(shards, tmp_path / "work", 4, "--tp", "2", "--pp", "2")
    assert status == 0, output
    assert " 0 fail" in output
    for name in ("all-reduce of all", "TP all-gather", "TP reduce-scatter", "PP send to the next"):
        assert f"pass  {name}" in output
    assert "24 samples in" in output
    assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file()]


def test_a_large_world_is_counted_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    total = torch.zeros((), dtype=torch.bfloat16)
    for rank in range(513):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        total += collectives._summand(None)
    assert total == 513 % 2


@pytest.mark.parametrize("harm", ["cut", "flip", "remove"])
def test_a_harmed_shard_is_named_with_the_remedy(harm: str, shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    shard = next(copy.glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data[:-1024] if harm == "cut" else data)
    if harm == "remove":
        shard.unlink()
    status, output = preflight(copy, tmp_path / "work", 1)
    assert status == 1
    assert "fail  shards" in output and shard.name in output
    assert "copy" in output.partition("fail  shards")[2].splitlines()[1]


def test_a_folder_that_cannot_be_written_is_a_row_and_not_the_end(
    shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    status, output = preflight(shards, tmp_path / "file" / "work", 1)
    assert status == 1
    assert "fail  speed of checkpoints" in output and "fail  shared folder" in output
    assert "pass  shards" in output


def test_what_the_run_would_refuse_fails(shards: Path, tmp_path: Path) -> None:
    flags = ["--preset", "gmai-vl-tiny", "--shards", str(shards), "--work-dir", str(tmp_path)]
    assert settings(parse(flags).config, 1).status == PASS
    wrong = [*flags, "--datasets", "LIST.json", "--load", str(tmp_path / "absent")]
    refused = settings(parse(wrong).config, 1)
    assert refused.status == FAIL
    assert "two sources of data" in refused.found and "there is no such folder" in refused.found
    (tmp_path / "LIST.json").write_text('{"other": {"annotations": "other.json"}}')
    other = ["--dset-cache-dir", str(shards), "--datasets", str(tmp_path / "LIST.json")]
    refused = settings(parse([*flags[:2], *flags[4:], *other, "--dset-from-cache"]).config, 1)
    assert refused.status == FAIL and "differ in their data sets" in refused.found


def test_the_size_of_a_checkpoint_is_the_size_on_disk(shards: Path, tmp_path: Path) -> None:
    flags = ["--freeze-llm", "--vit-use-lora", "--train-iters", "1"]
    output = trained(shards, tmp_path, 1, *flags)
    checkpoint = open_checkpoint(tmp_path / "checkpoints")
    size = sum(path.stat().st_size for path in checkpoint.path.iterdir())
    # In a file each tensor has a header, and adapters are many and small.
    expected = pytest.approx(size, rel=0.1)
    assert storage.checkpoint_bytes(checkpoint.config, "fp32") == expected, output


@pytest.mark.parametrize(("free", "status"), [(0.9, FAIL), (1.5, WARN), (4.0, PASS)])
def test_room_is_measured_in_checkpoints_of_this_run(
    free: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = storage.checkpoint_bytes(preset("gmai-vl-7b"), "bf16")
    assert size / 7.29e9 == pytest.approx(14, rel=0.01)  # all trained: 2 + 12 bytes a parameter
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, int(free * size)))
    (check,) = storage.room(tmp_path / "not" / "made" / "yet", size)
    assert check.status == status


@pytest.mark.parametrize(
    ("newest", "build", "status"), [("12.8", "13.0", FAIL), ("12.4", "12.8", WARN),
                                    ("13.0", "12.8", PASS), ("12.8", "12.8", PASS)]
)  # fmt: skip
def test_a_driver_runs_builds_of_its_own_and_earlier_versions(
    newest: str, build: str, status: str
) -> None:
    assert machine._driver_fits("driver", newest, build).status == status


@pytest.mark.parametrize(("minor", "status"), [("10", FAIL), ("11", PASS)])
def test_the_python_that_setup_asks_for_is_the_oldest_that_passes(
    minor: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.platform, "python_version_tuple", lambda: ("3", minor, "0"))
    assert next(iter(machine.versions())).status == status


def test_two_folders_of_one_name_on_two_hosts_are_told_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        list(storage.put_token(tmp_path / name, f"token of {name}"))
    (same,) = storage.same_folder(tmp_path / "one", "token of one", "n1")
    (other,) = storage.same_folder(tmp_path / "two", "token of one", "n2")
    assert (same.status, other.status) == (PASS, FAIL)
    assert "n2 sees another" in other.found


def test_the_worst_of_all_ranks_is_shown_and_who_has_it() -> None:
    good, bad = Check("disk", PASS, "fast"), Check("disk", FAIL, "full", "free space")
    (merged,) = merge([[good], [bad], [bad]])
    assert merged == Check("disk", FAIL, "full (rank 1 and 1 more)", "free space")
    assert merge([[good], [good]]) == [good]
    assert table([good, merged]).splitlines()[-1] == "1 pass, 0 warn, 1 fail"


def test_help_and_mistakes_answer_without_a_table(tmp_path: Path) -> None:
    process = run([sys.executable, "tools/preflight.py", "--tp", "3", "--work-dir", str(tmp_path)])
    output = finish(process)
    assert process.returncode == 2
    assert "does not divide" in output and "pass" not in output


@pytest.mark.parametrize(("needed", "status"), [(50, PASS), (76, WARN), (81, FAIL)])
def test_a_plan_is_held_against_the_gpus_memory(needed: int, status: str) -> None:
    check = memory.judge(needed * 2**30, 80 * 2**30)
    assert check.status == status and "80.0 GiB" in check.found


def test_the_memory_of_a_plan_is_the_planners(shards: Path) -> None:
    config = preset("gmai-vl-7b")
    parallel = dataclasses.replace(
        config.parallel, tensor_model_parallel_size=2, use_distributed_optimizer=True
    )
    device = Device("cpu", torch.device("cpu"), "gloo", torch.float32)
    (check,) = memory.fits_memory(dataclasses.replace(config, parallel=parallel), device, 0, 32)
    assert check.status == PASS
    assert 20 < float(check.found.split()[0]) < 60


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ({}, 3),
        ({"checkpoint_interval": 10}, 10),
        ({"checkpoint_interval": 0.25}, 4),
        ({"checkpoint_interval": 10, "keep_last": 2}, 3),
        ({"checkpoint_interval": 10, "keep_last": 2, "keep_every": 50}, 5),
    ],
)
def test_the_room_is_for_all_checkpoints_that_stay(flags: dict, kept: int) -> None:
    config = preset("gmai-vl-tiny")
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, **flags),
        train=dataclasses.replace(config.train, train_iters=100),
    )
    assert storage.checkpoints_kept(config) == kept


def test_a_run_tells_in_its_first_second_what_does_not_pass(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    config = parse(["--preset", "gmai-vl-tiny", "--shards", str(copy), "--work-dir", str(tmp_path)])
    device = Device("cpu", torch.device("cpu"), "gloo", torch.float32)
    assert list(first_checks(config.config, device)) == []
    next(copy.glob("*.tar")).unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2**20))
    room, files = first_checks(config.config, device)
    assert "fail: room for checkpoints: 1.0 MiB free" in room
    assert "fail: shards: " in files and "is absent" in files
