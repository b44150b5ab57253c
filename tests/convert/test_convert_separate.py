"""A language model and a CLIP in two folders become one model with a new projector."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from megatron_gmai.config import ModelConfig
from megatron_gmai.convert.huggingface import open_pretrained, open_separate
from megatron_gmai.convert.mapping import leftover_shapes

EMBEDDING = "language_model.embedding.word_embeddings.weight"
OUTPUT = "language_model.output_layer.weight"
IMAGE = 103  # two rows more than the 101 of the language model, and one for itself


@pytest.fixture
def whole(llava: LlavaForConditionalGeneration, tmp_path: Path) -> Path:
    llava.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def llm(llava: LlavaForConditionalGeneration, tmp_path: Path) -> Path:
    """The same Llama, as it would have been published alone."""
    model = LlamaForCausalLM(llava.config.text_config)
    state = llava.state_dict()
    prefix = "model.language_model."
    model.model.load_state_dict(
        {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    )
    model.lm_head.load_state_dict({"weight": state["lm_head.weight"]})
    model.save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


@pytest.fixture
def clip(llava: LlavaForConditionalGeneration, tmp_path: Path) -> Path:
    """The same vision tower in a whole CLIP, with its text tower and projections."""
    model = CLIPModel(CLIPConfig(vision_config=llava.config.vision_config.to_dict()))
    prefix = "model.vision_tower."
    state = {n.removeprefix(prefix): t for n, t in llava.state_dict().items() if prefix in n}
    model.vision_model.load_state_dict(state)
    model.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def opened(llm: Path, clip: Path, seed: int = 1) -> Any:
    return open_separate(llm, clip, vocab_size=IMAGE + 1, image_token_id=IMAGE, seed=seed)


def test_both_towers_come_unchanged(llm: Path, clip: Path, whole: Path) -> None:
    found, expected = opened(llm, clip), open_pretrained(whole)
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        if name not in (EMBEDDING, OUTPUT) and not name.startswith("projector."):
            assert torch.equal(found.weights[name], tensor), name
    assert all(torch.equal(found.leftovers[n], t) for n, t in expected.leftovers.items())
    assert found.leftovers.keys() == leftover_shapes(found.model).keys()


def test_missing_rows_are_the_mean_of_those_that_are_there(llm: Path, clip: Path) -> None:
    found = opened(llm, clip)
    assert found.model.language.vocab_size == IMAGE + 1
    assert found.model.image_token_id == IMAGE
    for name in (EMBEDDING, OUTPUT):
        tensor = found.weights[name]
        assert tensor.shape == (IMAGE + 1, 48)
        torch.testing.assert_close(tensor[101:], tensor[:101].mean(0).expand(3, -1))


def test_rows_beyond_the_tokenizer_stay(llm: Path, clip: Path) -> None:
    found = open_separate(llm, clip, vocab_size=90, image_token_id=89, seed=1)
    assert found.model.language.vocab_size == 101


def test_the_projector_depends_on_the_seed_alone(llm: Path, clip: Path) -> None:
    name = "projector.linear_fc1.weight"
    first, again, other = (opened(llm, clip, seed).weights[name] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_projector_has_the_dtype_of_the_language_model(llm: Path, clip: Path) -> None:
    file = llm / "model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file)
    weights = opened(llm, clip).weights
    assert weights["projector.linear_fc2.weight"].dtype == torch.bfloat16
    assert weights["vision_model.conv1.weight"].dtype == torch.float32


def test_an_internlm2_folder_is_read(llm: Path, clip: Path, model_config: ModelConfig) -> None:
    expected = {name: tensor.clone() for name, tensor in opened(llm, clip).weights.items()}
    language = model_config.language
    tensors = {
        "model.tok_embeddings.weight": expected[EMBEDDING][:101].clone(),
        "model.norm.weight": expected["language_model.decoder.final_layernorm.weight"],
        "output.weight": expected[OUTPUT][:101].clone(),
    }
    for n in range(language.num_layers):
        mine, theirs = f"language_model.decoder.layers.{n}", f"model.layers.{n}"
        gate, up = expected[f"{mine}.mlp.linear_fc1.weight"].chunk(2)
        tensors |= {
            f"{theirs}.attention.wqkv.weight": expected[f"{mine}.self_attention.linear_qkv.weight"],
            f"{theirs}.attention.wo.weight": expected[f"{mine}.self_attention.linear_proj.weight"],
            f"{theirs}.attention_norm.weight": expected[f"{mine}.input_layernorm.weight"],
            f"{theirs}.ffn_norm.weight": expected[f"{mine}.pre_mlp_layernorm.weight"],
            f"{theirs}.feed_forward.w1.weight": gate.clone(),
            f"{theirs}.feed_forward.w3.weight": up.clone(),
            f"{theirs}.feed_forward.w2.weight": expected[f"{mine}.mlp.linear_fc2.weight"],
        }
    config = json.loads((llm / "config.json").read_text())
    config |= {"model_type": "internlm2", "bias": False}
    (llm / "config.json").write_text(json.dumps(config))
    save_file(tensors, llm / "model.safetensors")
    found = opened(llm, clip)
    assert all(torch.equal(found.weights[n], tensor) for n, tensor in expected.items())


def test_a_tied_language_model_is_read(llm: Path, clip: Path) -> None:
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(llm / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, llm / "model.safetensors")
    found = opened(llm, clip)
    assert found.model.language.tie_word_embeddings
    assert OUTPUT not in found.weights and len(found.weights[EMBEDDING]) > 100


def test_qwen2_is_refused_for_its_biases(clip: Path, tmp_path: Path) -> None:
    small = Qwen2Config(
        hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=12,
        num_key_value_heads=4, vocab_size=101,
    )  # fmt: skip
    Qwen2ForCausalLM(small).save_pretrained(tmp_path / "qwen2")
    with pytest.raises(ValueError, match="'qwen2' is not supported: its query, key .* biases"):
        opened(tmp_path / "qwen2", clip)


def test_a_llama_with_biases_is_refused(clip: Path, tmp_path: Path) -> None:
    small = LlamaConfig(hidden_size=48, num_attention_heads=12, num_key_value_heads=4,
                        num_hidden_layers=1, vocab_size=101, attention_bias=True)  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="attention_bias is true"):
        opened(tmp_path / "llama", clip)


def test_folders_in_the_wrong_places_are_told(
    llm: Path, clip: Path, whole: Path, model_config: ModelConfig
) -> None:
    with pytest.raises(ValueError, match=r"clip.config.json: a language model of type 'clip'"):
        opened(clip, llm)
    with pytest.raises(ValueError, match=r"model_type 'llama' .*expected clip or clip_vision_mod"):
        opened(llm, llm)
    with pytest.raises(ValueError, match="use --llm and --vision"):
        open_pretrained(llm)


def test_missing_tensors_of_both_are_listed_together(llm: Path, clip: Path) -> None:
    for folder, name in ((llm, "model.norm.weight"), (clip, "vision_model.pre_layrnorm.bias")):
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        opened(llm, clip)
    assert "language_model.model.norm.weight is missing (expected (48,))" in str(error.value)
    assert "pre_layrnorm.bias is missing" in str(error.value)
