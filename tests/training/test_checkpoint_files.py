"""A checkpoint is whole or refused, and never runs code that it holds."""

import dataclasses
import json
import os
import pickle
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_gmai.config import Config, LoraConfig, RunConfig
from megatron_gmai.data.plan.plan import Bookmark
from megatron_gmai.runtime.device import Device
from megatron_gmai.training.checkpoint import (
    CheckpointError,
    Position,
    load_checkpoint,
    newest_whole_checkpoint,
    open_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from megatron_gmai.training.saving import Saver
from megatron_gmai.training.start import find_start, verified
from tests.parallel import batches
from tests.parallel.cases import Case, Processes, Trainer
from tests.training.resuming import save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of one run: iterations 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("saved")
    world = Processes()
    trainer = Trainer(Case("run"), world)
    for iteration in (1, 2, 3):
        trainer.step(iteration)
        save(trainer, folder, iteration)
    save(trainer, folder / "weights", 3, with_optimizer=False)
    world.close()
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_the_newest_is_found_by_its_folder_or_its_parent(folder: Path) -> None:
    for path in (folder, folder / "iter_0000003"):
        found = open_checkpoint(path)
        assert (found.path.name, found.position.iteration) == ("iter_0000003", 3)
    assert found.position.consumed_packs == 3 * batches.PACKS
    assert found.position.optimizer_steps == 3
    assert found.config.model == batches.MODEL
    assert (folder / "latest").read_text() == "iter_0000003"


def test_a_bookmark_comes_back_as_it_was_left(folder: Path, alone: Processes) -> None:
    trainer = Trainer(Case("run"), alone)
    bookmark = Bookmark("plan", pack=40, epoch=2, window=3, epoch_starts=(0, 15, 31))
    position = Position(4, 44, 0, bookmark)
    save_checkpoint(folder, position, trainer.chunks, None, trainer.config)
    assert open_checkpoint(folder).position == position


def test_a_checkpoint_of_before_there_were_bookmarks_is_read(folder: Path) -> None:
    path = folder / "iter_0000003"
    position = json.loads((path / "manifest.json").read_text())["position"]
    del position["bookmark"]
    edit_manifest(path, position=position)
    assert open_checkpoint(path).position == Position(3, 3 * batches.PACKS, 3)


def test_nothing_temporary_is_left(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"iter_0000001", "iter_0000002", "iter_0000003", "latest", "weights"}


def truncate(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])


def lose_a_file(path: Path) -> None:
    next(path.glob("*.distcp")).unlink()


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-30])


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest |= changes
    kept = {key: value for key, value in manifest.items() if value is not None}
    (path / "manifest.json").write_text(json.dumps(kept))


def name_a_file_outside(path: Path) -> None:
    outside = path.parent / "latest"
    edit_manifest(path, files={"../latest": outside.stat().st_size})


def forget_the_optimizer(path: Path) -> None:
    edit_manifest(path, has_optimizer=None)


def nest_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("[" * 100_000)


def claim_a_million_layers(path: Path) -> None:
    edit_language(path, num_layers=10**6)


def claim_no_heads(path: Path) -> None:
    edit_language(path, num_attention_heads=0)


def edit_language(path: Path, **changes: int) -> None:
    config = json.loads((path / "manifest.json").read_text())["config"]
    config["model"]["language"] |= changes
    edit_manifest(path, config=config)


def put_a_program_into_the_metadata(path: Path) -> None:
    class Program:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {path.parent / 'hacked'}",)

    replace_metadata(path, pickle.dumps(Program()))


def put_a_hidden_program_into_the_metadata(path: Path) -> None:
    text = f"__import__('os').system('touch {path.parent / 'hacked'}')".encode()
    replace_metadata(path, b"cbuiltins\neval\n(V" + text + b"\ntR.")


def declare_a_weight_as_bytes(path: Path) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.state_dict_metadata["projector.linear_fc1.bias"] = BytesStorageMetadata()
    replace_metadata(path, pickle.dumps(metadata))


def replace_metadata(path: Path, content: bytes) -> None:
    (path / ".metadata").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    edit_manifest(
        path,
        files=manifest["files"] | {".metadata": len(content)},
        crc32=manifest["crc32"] | {".metadata": zlib.crc32(content)},
    )


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: r"iter_0000003 is damaged: __0_0.distcp should have \d+ bytes, found \d+",
    lose_a_file: r"__0_0.distcp should have \d+ bytes, found no file",
    lose_the_manifest: r"is not a whole checkpoint: it has no manifest.json",
    cut_the_manifest: r"manifest.json cannot be read",
    name_a_file_outside: r"damaged: \.\./latest",
    forget_the_optimizer: r"manifest.json cannot be read: 'has_optimizer'",
    nest_the_manifest: r"manifest.json cannot be read: maximum recursion",
    claim_a_million_layers: r"manifest.json speaks of 1000000 layers, with \d+ tensors",
    claim_no_heads: r"manifest.json cannot be read: num_attention_heads is 0",
    put_a_program_into_the_metadata: r"was not loaded: it asks for posix.system",
    put_a_hidden_program_into_the_metadata: r"was not loaded: it asks for builtins.eval",
    declare_a_weight_as_bytes: r"was not loaded: projector.linear_fc1.bias is not a tensor",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_damaged_is_refused_and_the_one_before_is_used(
    damage: Callable[[Path], None], folder: Path
) -> None:
    damage(folder / "iter_0000003")
    with pytest.raises(CheckpointError, match=DAMAGES[damage]):
        open_checkpoint(folder)
    found, skipped = newest_whole_checkpoint(folder)
    assert found is not None
    assert found.position.iteration == 2
    assert len(skipped) == 1
    assert not (folder / "hacked").exists()


def test_what_was_being_written_does_not_count(folder: Path) -> None:
    shutil.copytree(folder / "iter_0000003", folder / ".iter_0000004.incomplete")
    found, skipped = newest_whole_checkpoint(folder)
    assert found is not None
    assert (found.position.iteration, skipped) == (3, [])


def test_without_any_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert newest_whole_checkpoint(tmp_path / "nowhere") == (None, [])
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        open_checkpoint(tmp_path / "nowhere")


def test_bytes_that_changed_inside_a_file_are_told(folder: Path, alone: Processes) -> None:
    path = folder / "iter_0000003"
    file = next(path.glob("*.distcp"))
    file.write_bytes(bytes(file.stat().st_size))
    trainer = Trainer(Case("run"), alone)
    with pytest.raises(
        CheckpointError, match="iter_0000003 cannot be loaded: rank 0: .*\nIts bytes have changed"
    ):
        load_checkpoint(open_checkpoint(path), trainer.chunks, None)


def flip_a_bit(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.usefixtures("alone")
def test_a_flipped_bit_is_told_and_the_checkpoint_before_is_resumed(folder: Path) -> None:
    newest = open_checkpoint(folder / "iter_0000003")
    verify_checkpoint(newest)
    flip_a_bit(newest.path)
    with pytest.raises(CheckpointError, match=r"damaged: __0_0.distcp has the CRC-32 \w{8}, not"):
        verify_checkpoint(newest)

    lines: list[str] = []
    settings = RunConfig(resume=True, save=str(folder))
    config = dataclasses.replace(batches.CONFIG, run=settings)
    start = verified(find_start(config, lines.append), config, lines.append)
    assert start.resume is not None and start.resume.position.iteration == 2
    assert sum("iter_0000003 is damaged" in line for line in lines) == 1

    settings = RunConfig(load=str(newest.path))
    config = dataclasses.replace(batches.CONFIG, run=settings)
    with pytest.raises(CheckpointError, match="iter_0000003 is damaged"):
        verified(find_start(config, lines.append), config, lines.append)


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_of_before_there_were_checksums_is_read(folder: Path) -> None:
    edit_manifest(folder / "iter_0000003", crc32=None)
    verify_checkpoint(open_checkpoint(folder / "iter_0000003"))


def test_another_model_is_told(
    folder: Path, alone: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = dataclasses.replace(batches.MODEL.language, num_layers=6)
    model = dataclasses.replace(batches.MODEL, language=language)
    monkeypatch.setattr("tests.parallel.cases.MODEL", model)
    monkeypatch.setattr(
        "tests.parallel.cases.CONFIG", dataclasses.replace(batches.CONFIG, model=model)
    )
    trainer = Trainer(Case("run"), alone)
    with pytest.raises(
        CheckpointError, match=r"cannot be loaded: .*layers\.4.*\n.*with other sizes"
    ):
        load_checkpoint(open_checkpoint(folder), trainer.chunks, None)


def test_weights_alone_start_a_stage_but_cannot_resume(folder: Path, alone: Processes) -> None:
    checkpoint = open_checkpoint(folder / "weights")
    names = pickle.loads((checkpoint.path / ".metadata").read_bytes()).state_dict_metadata
    assert not any(name.startswith("optimizer") for name in names)
    trainer = Trainer(Case("run", phase=1), alone)
    with pytest.raises(CheckpointError, match="holds weights only .* Start from its weights with"):
        load_checkpoint(checkpoint, trainer.chunks, trainer.optimizer)
    start = {name: p.clone() for name, p in trainer.chunks[0].named_parameters()}
    load_checkpoint(checkpoint, trainer.chunks, None)
    moved = [n for n, p in trainer.chunks[0].named_parameters() if not torch.equal(p, start[n])]
    assert len(moved) == len(start)


def test_adapters_fit_only_towers_that_have_some(folder: Path, alone: Processes) -> None:
    both = LoraConfig(llm_use_lora=True, vit_use_lora=True, lora_rank=2)
    trainer = Trainer(Case("run", lora=both), alone)
    with pytest.raises(CheckpointError, match="holds no adapters, so .* Start from its weights"):
        load_checkpoint(open_checkpoint(folder), trainer.chunks, trainer.optimizer)
    load_checkpoint(open_checkpoint(folder), trainer.chunks, None)
    path = save(trainer, folder / "adapters", 3)
    names = pickle.loads((path / ".metadata").read_bytes()).state_dict_metadata
    weights = {name for name in names if not name.startswith(("optimizer", "rng", "projector"))}
    assert weights and all(".lora." in name for name in weights)
    one = dataclasses.replace(both, llm_use_lora=False)
    for lora in (LoraConfig(), one):
        trainer = Trainer(Case("run", lora=lora), alone)
        with pytest.raises(
            CheckpointError,
            match="adapters of the vision tower and the language model. Continue with "
            "--llm-use-lora --vit-use-lora alone, or merge them",
        ):
            load_checkpoint(open_checkpoint(path), trainer.chunks, None)


def test_saving_an_iteration_again_replaces_it(folder: Path, alone: Processes) -> None:
    trainer = Trainer(Case("run"), alone)
    trainer.step(0)
    (folder / "iter_0000003" / "old").write_text("of an earlier run")
    save(trainer, folder, 3)
    assert not (folder / "iter_0000003" / "old").exists()
    assert open_checkpoint(folder).position.optimizer_steps == 1


def test_the_thread_that_saves_has_the_gpu_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread's is the first of the machine: all its processes would take memory there."""
    chosen: list[tuple[str, Any]] = []
    name = lambda: threading.current_thread().name  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: chosen.append((name(), gpu)))
    device = Device("cuda", torch.device("cuda", 3), "nccl", torch.bfloat16)
    run: Any = SimpleNamespace(world=SimpleNamespace(device=device, storage=None), config=Config())
    Saver(run).executor.submit(int).result()
    assert chosen == [("save_0", device.torch_device)]
