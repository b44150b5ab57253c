"""The original flavour out, and what every export says of itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_gmai.convert.huggingface import open_pretrained
from megatron_gmai.convert.mapping import leftover_shapes
from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.images.window import MEAN_COLOUR
from tests.convert.conftest import Export


@pytest.fixture
def original(export: Callable[..., Export]) -> Export:
    return export(flavour="original", rope_scaling_factor=2.0)


def test_the_original_flavour_has_its_own_names_and_wqkv_verbatim(original: Export) -> None:
    tensors = load_file(original.folder / "model.safetensors")
    layer = "language_model.model.layers.1"
    mine = "language_model.decoder.layers.1"
    qkv = original.weights[f"{mine}.self_attention.linear_qkv.weight"]
    gate, up = original.weights[f"{mine}.mlp.linear_fc1.weight"].chunk(2)
    assert torch.equal(tensors[f"{layer}.attention.wqkv.weight"], qkv)
    assert torch.equal(tensors[f"{layer}.feed_forward.w1.weight"], gate)
    assert torch.equal(tensors[f"{layer}.feed_forward.w3.weight"], up)
    assert {"language_model.output.weight", "language_model.model.tok_embeddings.weight"} <= set(
        tensors
    )
    assert set(leftover_shapes(original.model)) <= set(tensors)
    assert not any("lm_head" in name or "q_proj" in name for name in tensors if "language" in name)


def test_the_original_flavour_reads_back(original: Export) -> None:
    found = open_pretrained(original.folder)
    assert (found.flavour, found.model) == ("original", original.model)
    assert all(torch.equal(found.weights[n], tensor) for n, tensor in original.weights.items())


def test_its_config_names_its_classes_and_keeps_the_rope(original: Export) -> None:
    config = json.loads((original.folder / "config.json").read_text())
    assert config["model_type"] == "enhanced_llava"
    assert config["auto_map"]["AutoModel"] == "modeling_llava.LlavaForConditionalGeneration"
    text = config["text_config"]
    assert text["auto_map"]["AutoConfig"] == "configuration_internlm2.InternLM2Config"
    assert (text["bias"], text["rope_theta"]) == (False, 1e6)
    assert (text["rope_scaling"]["type"], text["rope_scaling"]["factor"]) == ("dynamic", 2.0)
    assert config["pad_token_id"] == original.tokenizer.pad_id


def test_its_tokenizer_needs_no_remote_code(original: Export) -> None:
    tokenizer = AutoTokenizer.from_pretrained(original.folder, trust_remote_code=False)
    message = [{"role": "user", "content": "<image>\nbrain MR?"}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>\nbrain MR?<|im_end|>\n<|im_start|>assistant\n"
    settings = json.loads((original.folder / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (original.folder / "chat_template.jinja").read_text()


def code_of(folder: Path, function: str) -> Callable[[Any], Any]:
    """A function out of an export's README.md."""
    text = (folder / "README.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    (code,) = (block for block in blocks if f"def {function}(" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    return names[function]


@pytest.mark.parametrize("low", [0, 400, 65_535])
@pytest.mark.parametrize("kind", ["uniform", "normal", "constant", "two values"])
def test_the_readme_windows_deep_images_as_training_does(
    export: Callable[..., Export], tmp_path: Path, low: int, kind: str
) -> None:
    generator = np.random.default_rng(3)
    values = {
        "uniform": generator.integers(0, 4096, (40, 50)),
        "normal": generator.normal(2000, 300, (40, 50)),
        "constant": np.full((40, 50), 7),
        "two values": np.where(np.arange(2000).reshape(40, 50) == 9, 5000, 3),
    }[kind]
    image = Image.fromarray(np.clip(values + low, 0, 65_535).astype(np.uint16))
    image.save(tmp_path / "deep.png")
    convert = code_of(export().folder, "to_8_bits")
    with Image.open(tmp_path / "deep.png") as read:
        ours = np.asarray(convert(read))
    assert np.array_equal(ours, decode((tmp_path / "deep.png").read_bytes()))


def test_the_readme_of_the_original_flavour_pads_as_training_does(original: Export) -> None:
    pad = code_of(original.folder, "pad")
    square = np.asarray(pad(Image.new("RGB", (4, 2), (9, 9, 9))))
    assert square.shape == (4, 4, 3)
    assert (square[0] == MEAN_COLOUR).all() and (square[1:3] == 9).all()
    text = (original.folder / "README.md").read_text()
    assert "modeling_internlm2.py" in text and "trust_remote_code=True" in text


def test_the_readme_tells_where_the_unused_clip_parts_come_from(
    export: Callable[..., Export], tmp_path: Path
) -> None:
    without = export(folder="without")
    assert "never\nrun. Here they are an identity" in (without.folder / "README.md").read_text()
    leftovers = {n: torch.randn(shape) for n, shape in leftover_shapes(without.model).items()}
    written = export(folder="with", leftovers=leftovers)
    assert "those of the CLIP that training began" in (written.folder / "README.md").read_text()
    tensors = load_file(written.folder / "model.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in leftovers.items())


def test_half_of_the_unused_clip_parts_is_refused(export: Callable[..., Export]) -> None:
    model = export(folder="a").model
    leftovers = {n: torch.zeros(shape) for n, shape in leftover_shapes(model).items()}
    leftovers.popitem()
    with pytest.raises(ValueError, match="post_layernorm.bias is missing"):
        export(folder="b", leftovers=leftovers)
