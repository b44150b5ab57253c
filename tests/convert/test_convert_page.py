"""The commands of docs/weights.md run as they stand, one after the other."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from megatron_gmai.config import LoraConfig, RunConfig
from tests.convert.conftest import Export, save_adapters
from tools.convert_checkpoint import main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "weights.md").read_text()
COMMANDS = re.findall(r"^python tools/convert_checkpoint\.py (.+)$", PAGE, flags=re.MULTILINE)
CODE = re.findall(r"```python\n(.+?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def folders(export: Callable[..., Export], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MODEL, adapters on it in LORA, and LLM and CLIP beside it: random, with the tokenizer of
    MODEL."""
    written = export(folder="MODEL")
    lora = LoraConfig(llm_use_lora=True, lora_rank=2)
    save_adapters(tmp_path / "LORA", written, lora, RunConfig(llava="MODEL"))
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=written.model.language.vocab_size - 1,  # without <image>
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    ).save_pretrained(tmp_path / "LLM")
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            image_size=28, patch_size=14,
        )
    ).save_pretrained(tmp_path / "CLIP")  # fmt: skip
    model_file = (written.folder / "tokenizer.model").read_bytes()
    (tmp_path / "LLM" / "tokenizer.model").write_bytes(model_file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run(folders: Path) -> None:
    whole, separate, to_hf, to_gmai, merge, to_peft, verify = map(shlex.split, COMMANDS)
    assert main(whole) == 0
    (folders / "START").rename(folders / "CHECKPOINTS")
    for words in (to_hf, to_gmai, verify, merge, to_peft):
        assert main(words) == 0, words
    assert (folders / "HF" / "card.json").is_file()
    names: dict[str, Any] = {}
    exec(CODE[1], names)
    assert any("lora_B" in name for name, _ in names["model"].named_parameters())
    assert main(separate) == 0
    assert main(["to-hf", "--load", "START", "--output", "JOINED"]) == 0


def test_the_program_to_load_it_runs(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folders / "MODEL").rename(folders / "HF")
    image = Image.fromarray(np.zeros((30, 40, 3), dtype=np.uint8))
    names: dict[str, Any] = {"image": image}
    exec(CODE[0], names)
    assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]
