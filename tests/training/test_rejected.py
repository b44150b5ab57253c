"""Samples that turn out unreadable during a run: all ranks know of all of them."""

import shutil
from pathlib import Path

import pytest

from megatron_gmai.data.ledger import read_ledger
from megatron_gmai.data.shards.reader import Shards
from tests.training.command import finish, start

DAMAGED = 4  # of 24 samples


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> Path:
    """Shards in which some samples' images have changed since they were written."""
    copy = shutil.copytree(shards, tmp_path / "shards")
    opened = Shards(copy)
    rows = [row for row in opened.rows if row["images"]][:DAMAGED]
    for row in rows:
        tar = copy / opened.manifest.shards[row["shard"]].name
        content = bytearray(tar.read_bytes())
        content[int(row["offset"]) + int(row["size"]) - 600] ^= 1  # behind the annotation
        tar.write_bytes(content)
    return copy


def test_the_run_stops_on_all_ranks_with_the_exact_count_told_once(
    damaged: Path, tmp_path: Path
) -> None:
    """Two ranks share the data, so neither finds all of it: that is seen by their sum alone."""
    share = (DAMAGED - 0.5) / 24
    flags = ("--max-rejected", f"{share:.3f}", "--num-workers", "1")
    process = start(damaged, tmp_path / "work", 2, *flags)
    output = finish(process)
    assert process.returncode != 0
    assert output.count(f"error: {DAMAGED} of 24 samples cannot be used") == 1, output
    assert output.count("cannot be used") == 1
    found = read_ledger(tmp_path / "work" / "rejected.jsonl")
    assert len(found) == DAMAGED and all("checksum" in line.reason for line in found)
