"""Adapters leave as PEFT reads them and as merged weights, and both say what training said."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText

from megatron_gmai.config import LoraConfig, RunConfig
from megatron_gmai.convert.adapters import open_trained
from megatron_gmai.convert.manifest import read_manifest
from megatron_gmai.evaluate.agreement import difference, run_megatron, run_transformers, samples
from megatron_gmai.runtime.groups import destroy_groups
from megatron_gmai.runtime.world import open_world
from megatron_gmai.training.checkpoint import open_checkpoint
from megatron_gmai.training.inference import load_for_inference
from megatron_gmai.training.inference import open_trained as open_trained_run
from megatron_gmai.training.start import Start, with_base
from megatron_gmai.weights import weights
from tests.convert.conftest import Export, save_adapters
from tools.convert_checkpoint import main

ALL = "qkv,proj,fc1,fc2"
TARGETS = ["qkv", "proj", "fc1", "fc2"]
VISION = {"llm_use_lora": False, "vit_use_lora": True}
BOTH = {"vit_use_lora": True}
PROJECTOR = "projector.linear_fc1.weight"
DOWN = "language_model.decoder.layers.0.mlp.linear_fc2.weight"


def lora(targets: str = ALL, llm_use_lora: bool = True, vit_use_lora: bool = False) -> LoraConfig:
    return LoraConfig(llm_use_lora, vit_use_lora, 3, 7.5, lora_targets=targets)


@pytest.fixture
def source(export: Callable[..., Export]) -> Export:
    return export(folder="source")


def on_source(source: Export) -> RunConfig:
    return RunConfig(llava=str(source.folder))


def program(command: str, load: Path, output: Path, *more: str) -> int:
    return main([command, "--load", str(load), "--output", str(output), *more])


def logits(folder: Path, adapter: Path | None = None) -> Tensor:
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    ids = torch.tensor([[5, *[model.config.image_token_id] * 16, 7, 8, 9, 30]])
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=pixels).logits


@pytest.mark.parametrize(
    ("targets", "towers"),
    [*((target, towers) for towers in ({}, VISION) for target in TARGETS), (ALL, {}), (ALL, BOTH)],
    ids=str,
)
def test_peft_and_merged_weights_agree_and_change_the_model(
    source: Export, tmp_path: Path, targets: str, towers: dict[str, bool]
) -> None:
    run = save_adapters(tmp_path / "run", source, lora(targets, **towers), on_source(source))
    assert program("to-hf", run, tmp_path / "merged") == 0
    assert program("to-peft", run, tmp_path / "adapter") == 0
    stock, merged = logits(source.folder), logits(tmp_path / "merged")
    adapted = logits(source.folder, tmp_path / "adapter")
    assert (adapted - stock).abs().max() > 0.05
    assert (adapted - merged).abs().max() <= 1e-5 * merged.abs().max()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(source.folder)


@pytest.mark.parametrize("towers", [{}, VISION], ids=["language model", "vision tower"])
def test_merged_weights_say_what_the_training_model_with_adapters_says(
    source: Export, tmp_path: Path, towers: dict[str, bool]
) -> None:
    run = save_adapters(tmp_path / "run", source, lora(ALL, **towers), on_source(source))
    assert program("to-hf", run, tmp_path / "merged") == 0
    prompts = samples(source.model)
    trained = open_trained_run(run)
    config = replace(trained.config, run=replace(trained.config.run, device="cpu", dtype="fp32"))
    try:
        ours = run_megatron(load_for_inference(trained, config, open_world(config)), prompts)
    finally:
        destroy_groups()
    theirs = run_transformers(tmp_path / "merged", prompts)
    largest, agreeing, tokens = difference(ours, theirs)
    assert largest <= 1e-5 * max(float(each.abs().max()) for each in ours.logits)
    assert agreeing == tokens


def test_the_base_may_be_a_training_checkpoint_or_lie_under_an_earlier_run(
    source: Export, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    assert main(["from-hf", "--model", str(source.folder), "--output", str(full)]) == 0
    expected = open_trained(
        read_manifest(save_adapters(tmp_path / "a", source, lora(), on_source(source)))
    )
    save_adapters(tmp_path / "b", source, lora(), RunConfig(load=str(full)))
    save_adapters(tmp_path / "c", source, lora(), RunConfig(load=str(tmp_path / "b")))
    for name in ("b", "c"):
        found = open_trained(read_manifest(tmp_path / name))
        assert found.keys() == weights(source.model).keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    # Training finds the same ones, here when the last of three runs is resumed.
    last = open_checkpoint(tmp_path / "c")
    below = with_base(Start(resume=last), last.config).base
    assert below is not None
    assert below.path.parent == full


def test_a_base_that_moved_is_asked_for(
    source: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = RunConfig(llava=str(tmp_path / "gone"))
    run = save_adapters(tmp_path / "run", source, lora(), moved)
    for command in ("to-hf", "to-peft"):
        output = tmp_path / command
        assert program(command, run, output) == 2
        assert "say with --base where it is" in capsys.readouterr().err
        assert program(command, run, output, "--base", str(source.folder)) == 0
    verified = ["verify", str(run), str(tmp_path / "to-hf")]
    assert main(verified) == 2
    assert main([*verified, "--base", str(source.folder)]) == 0


def test_a_base_of_another_model_or_of_adapters_is_refused(
    source: Export,
    export: Callable[..., Export],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = save_adapters(tmp_path / "run", source, lora(), on_source(source))
    other = export(folder="other", language=replace(source.model.language, num_layers=1))
    assert program("to-hf", run, tmp_path / "out", "--base", str(other.folder)) == 2
    assert "is not what the adapters lie on" in capsys.readouterr().err
    assert program("to-hf", run, tmp_path / "out", "--base", str(run)) == 2
    assert "holds adapters itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("towers", "trained", "words"),
    [
        ({}, [PROJECTOR], "the projector"),
        (VISION, [PROJECTOR, DOWN], "the projector and the language model"),
    ],
    ids=["language model", "vision tower"],
)
def test_what_was_trained_in_full_goes_into_the_model_below_the_adapters(
    source: Export,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    towers: dict[str, bool],
    trained: list[str],
    words: str,
) -> None:
    changes = {name: source.weights[name] + 0.2 for name in trained}
    run = save_adapters(tmp_path / "run", source, lora(ALL, **towers), on_source(source), changes)
    assert program("to-hf", run, tmp_path / "merged") == 0
    assert program("to-hf", run, tmp_path / "below", "--without-adapters") == 0
    assert program("to-peft", run, tmp_path / "adapter") == 0
    assert f"the run also trained {words}: see" in capsys.readouterr().out
    readme = (tmp_path / "adapter" / "README.md").read_text()
    assert f"also trained {words}, which" in readme and "--without-adapters" in readme
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    merged = logits(tmp_path / "merged")
    assert (logits(tmp_path / "below") - logits(source.folder)).abs().max() > 0.01
    adapted = logits(tmp_path / "below", tmp_path / "adapter")
    assert (adapted - merged).abs().max() <= 1e-5 * merged.abs().max()


def test_a_checkpoint_without_adapters_has_nothing_for_peft(
    source: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    assert main(["from-hf", "--model", str(source.folder), "--output", str(full)]) == 0
    assert program("to-peft", full, tmp_path / "adapter") == 2
    assert "holds no adapters" in capsys.readouterr().err
