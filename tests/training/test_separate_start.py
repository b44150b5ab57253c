"""A run starts from a language model and a CLIP in two folders, as they are published."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from megatron_gmai.data.text.tokenizer import load_tokenizer
from tests.training.command import losses, trained
from tools.convert_checkpoint import main

V_PROJ = "layers.0.self_attn.v_proj"
# What stands before it in an export, and in PEFT's format: of the language model, of CLIP.
PREFIXES = [
    ("language_model.model", "language_model"),
    ("vision_tower.vision_model.encoder", "vision_tower.vision_model.encoder"),
]


@pytest.fixture
def folders(shards: Path, tmp_path: Path) -> tuple[Path, Path]:
    """LLM with its tokenizer, whose `<image>` it has no row for, and CLIP: random, tiny."""
    llm, clip = tmp_path / "LLM", tmp_path / "CLIP"
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=load_tokenizer(shards / "tokenizer.model").vocab_size - 1,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).save_pretrained(llm)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            image_size=56, patch_size=14,
        )
    ).save_pretrained(clip)  # fmt: skip
    shutil.copy(shards / "tokenizer.model", llm)
    return llm, clip


def test_two_folders_start_a_run_as_their_conversion_does(
    folders: tuple[Path, Path], shards: Path, tmp_path: Path
) -> None:
    llm, clip = map(str, folders)
    converted = tmp_path / "START"
    assert main(["from-hf", "--llm", llm, "--vision", clip, "--output", str(converted)]) == 0
    for name, flags in (
        ("direct", ["--llm", llm, "--vision", clip]),
        ("converted", ["--load", str(converted), "--tokenizer", llm]),
    ):
        trained(shards, tmp_path / name, 1, "--freeze-llm", "--freeze-vit", *flags)
    assert losses(tmp_path / "direct") == losses(tmp_path / "converted")
    direct = tmp_path / "direct" / "checkpoints"
    assert list(direct.glob("*/carried.safetensors"))  # CLIP's last layer, for the export


def test_adapters_trained_in_two_ranks_leave_merged_and_for_peft(
    folders: tuple[Path, Path], shards: Path, tmp_path: Path
) -> None:
    llm, clip = map(str, folders)
    flags = ["--llm", llm, "--vision", clip, "--llm-use-lora", "--vit-use-lora", "--lr", "1e-2"]
    trained(shards, tmp_path / "run", 2, "--tp", "2", *flags)
    run = str(tmp_path / "run" / "checkpoints")
    assert main(["to-hf", "--load", run, "--output", str(tmp_path / "merged")]) == 0
    assert main(["to-peft", "--load", run, "--output", str(tmp_path / "adapter")]) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for folder, (in_export, in_peft) in zip(folders, PREFIXES, strict=True):
        start = load_file(folder / "model.safetensors")
        (before,) = (tensor for name, tensor in start.items() if f"{V_PROJ}.weight" in name)
        stem = f"base_model.model.model.{in_peft}.{V_PROJ}.lora_"
        delta = 2 * adapter[f"{stem}B.weight"] @ adapter[f"{stem}A.weight"]  # alpha / r is 2
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(merged[f"{in_export}.{V_PROJ}.weight"], before + delta)
