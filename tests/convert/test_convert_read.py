"""Checkpoints of both flavours are read; damaged or foreign ones are refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from megatron_gmai.config import ModelConfig
from megatron_gmai.convert.huggingface import open_pretrained
from megatron_gmai.convert.mapping import leftover_shapes, rows
from tests.convert.conftest import edit_config

WQKV = "language_model.model.layers.0.attention.wqkv.weight"


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_sizes_come_from_the_config(saved: Path, model_config: ModelConfig) -> None:
    assert open_pretrained(saved).model == model_config


def test_keys_left_out_have_the_class_defaults(saved: Path) -> None:
    def strip(config: dict[str, Any]) -> None:
        for key in ("hidden_act", "layer_norm_eps"):
            del config["vision_config"][key]
        for key in ("vision_feature_layer", "projector_hidden_act", "multimodal_projector_bias"):
            config.pop(key, None)
        for key in ("rms_norm_eps", "rope_parameters"):
            del config["text_config"][key]

    edit_config(saved, strip)
    model = open_pretrained(saved).model
    assert (model.language.rmsnorm_eps, model.language.rope_theta) == (1e-6, 1e4)
    assert model.vision.layernorm_eps == 1e-5


@pytest.mark.parametrize("spelling", ["4.46", "5", "state_dict", "bin", "sharded bin"])
def test_all_spellings_and_files_give_the_same_weights(
    llava: LlavaForConditionalGeneration, saved: Path, spelling: str
) -> None:
    expected = dict(open_pretrained(saved).weights)
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    if spelling == "state_dict":
        tensors = {name: tensor.contiguous() for name, tensor in llava.state_dict().items()}
    if spelling == "4.46":
        tensors = {
            name.replace("vision_tower.", "vision_tower.vision_model."): tensor
            for name, tensor in tensors.items()
        }
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)
    if spelling == "bin":
        torch.save(tensors, saved / "pytorch_model.bin")
    elif spelling == "sharded bin":
        half = list(tensors)[::2]
        weight_map = {name: f"part-{int(name in half)}.bin" for name in tensors}
        for file in set(weight_map.values()):
            part = {name: tensors[name] for name in tensors if weight_map[name] == file}
            torch.save(part, saved / file)
        index = saved / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(tensors, saved / "model.safetensors")
    found = open_pretrained(saved).weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def original_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of the original flavour, as GMAI-VL's own classes write it."""
    vision, language = model.vision, model.language
    return {
        "model_type": "enhanced_llava",
        "image_token_index": model.image_token_id,
        "auto_map": {"AutoConfig": "configuration_enhanced_llava.EnhancedLlavaConfig"},
        "vision_config": {
            "model_type": "clip_vision_model",
            "num_hidden_layers": vision.num_layers,
            "hidden_size": vision.hidden_size,
            "num_attention_heads": vision.num_attention_heads,
            "intermediate_size": vision.ffn_hidden_size,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
        },
        "text_config": {
            "model_type": "internlm2",
            "num_hidden_layers": language.num_layers,
            "hidden_size": language.hidden_size,
            "num_attention_heads": language.num_attention_heads,
            "num_key_value_heads": language.num_query_groups,
            "intermediate_size": language.ffn_hidden_size,
            "vocab_size": language.vocab_size,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "max_position_embeddings": language.max_position_embeddings,
            "bias": False,
        },
    }


@pytest.fixture
def original(
    tmp_path: Path,
    model_config: ModelConfig,
    random_weights: Callable[[ModelConfig], dict[str, Tensor]],
) -> tuple[Path, dict[str, Tensor]]:
    """A folder in GMAI-VL's own layout, written key by key, and its canonical weights."""
    language = model_config.language
    weights = random_weights(model_config)
    canonical = "language_model.decoder.layers"
    theirs: dict[str, Tensor] = {
        "language_model.model.tok_embeddings.weight": weights[
            "language_model.embedding.word_embeddings.weight"
        ],
        "language_model.model.norm.weight": weights[
            "language_model.decoder.final_layernorm.weight"
        ],
        "language_model.output.weight": weights["language_model.output_layer.weight"],
    }
    for n in range(language.num_layers):
        layer, mine = f"language_model.model.layers.{n}", f"{canonical}.{n}"
        gate, up = weights[f"{mine}.mlp.linear_fc1.weight"].split(language.ffn_hidden_size)
        theirs |= {
            f"{layer}.attention.wqkv.weight": weights[f"{mine}.self_attention.linear_qkv.weight"],
            f"{layer}.attention.wo.weight": weights[f"{mine}.self_attention.linear_proj.weight"],
            f"{layer}.attention_norm.weight": weights[f"{mine}.input_layernorm.weight"],
            f"{layer}.ffn_norm.weight": weights[f"{mine}.pre_mlp_layernorm.weight"],
            f"{layer}.feed_forward.w1.weight": gate.clone(),
            f"{layer}.feed_forward.w3.weight": up.clone(),
            f"{layer}.feed_forward.w2.weight": weights[f"{mine}.mlp.linear_fc2.weight"],
        }
    for row in rows(model_config, "transformers"):
        if not row.canonical.startswith("language_model."):
            parts = row.rule.split(weights[row.canonical])
            theirs |= {s: part.clone() for s, part in zip(row.sources, parts, strict=True)}
    theirs |= {name: torch.randn(shape) for name, shape in leftover_shapes(model_config).items()}
    folder = tmp_path / "original"
    folder.mkdir()
    save_file(theirs, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(original_config(model_config)))
    return folder, weights


def test_the_original_flavour_is_read(
    original: tuple[Path, dict[str, Tensor]], model_config: ModelConfig
) -> None:
    folder, weights = original
    found = open_pretrained(folder)
    language = replace(model_config.language, rope_scaling_factor=2.0)
    assert found.model == replace(model_config, language=language)
    assert found.weights.keys() == weights.keys()
    assert all(torch.equal(found.weights[name], weights[name]) for name in weights)
    assert found.leftovers.keys() == leftover_shapes(model_config).keys()


def test_wqkv_is_interleaved_by_group_not_q_then_k_then_v(
    original: tuple[Path, dict[str, Tensor]], model_config: ModelConfig
) -> None:
    folder, _ = original
    language = model_config.language
    groups = language.num_query_groups
    per_group, head = language.num_attention_heads // groups, 4
    fused = load_file(folder / "model.safetensors")[WQKV]
    grouped = fused.view(groups, per_group + 2, head, language.hidden_size)
    qkv = "language_model.decoder.layers.0.self_attention.linear_qkv.weight"
    row = next(r for r in rows(model_config, "transformers") if r.canonical == qkv)
    query, key, value = row.rule.split(open_pretrained(folder).weights[qkv])
    assert torch.equal(query, grouped[:, :per_group].reshape(query.shape))
    assert torch.equal(key, grouped[:, per_group].reshape(key.shape))
    assert torch.equal(value, grouped[:, per_group + 1].reshape(value.shape))


def test_internlm2_has_biases_unless_the_config_says_no(
    original: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, _ = original
    edit_config(folder, lambda config: config["text_config"].pop("bias"))
    with pytest.raises(ValueError, match=r"text_config.bias is true"):
        open_pretrained(folder)


def test_weights_are_read_one_at_a_time(saved: Path) -> None:
    found = open_pretrained(saved)
    name = "language_model.decoder.final_layernorm.weight"
    assert found.weights[name] is not found.weights[name]
    with pytest.raises(KeyError):
        found.weights["language_model.wat"]


def test_without_the_last_vision_layer_there_are_no_leftovers(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.pop("vision_tower.post_layernorm.bias"))
    assert dict(open_pretrained(saved).leftovers) == {}


def test_every_unsupported_setting_is_reported_at_once(saved: Path) -> None:
    def spoil(config: dict[str, Any]) -> None:
        config["vision_feature_layer"] = -1
        config["vision_config"]["hidden_act"] = "gelu"
        config["text_config"]["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0}
        config["text_config"]["mlp_bias"] = True

    edit_config(saved, spoil)
    with pytest.raises(ValueError) as error:
        open_pretrained(saved)
    for part in ("vision_feature_layer is -1", "'gelu'", "'yarn'", "mlp_bias is true"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_config", "hidden_size", "48"),
        ("text_config", "num_key_value_heads", 5),
        ("text_config", "num_attention_heads", 0),
        ("text_config", "head_dim", 64),
        ("text_config", "rms_norm_eps", None),
        ("text_config", "rope_theta", None),
        ("text_config", "rope_theta", -1.0),
        ("text_config", "rope_theta", 10**400),
        ("text_config", "rms_norm_eps", float("inf")),
        ("text_config", "num_hidden_layers", 10**6),
        ("text_config", "rope_scaling", "dynamic"),
        ("text_config", "rope_scaling", {"type": "dynamic"}),
        ("text_config", "rope_scaling", {"type": "dynamic", "factor": 0.5}),
        ("text_config", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("vision_config", "layer_norm_eps", "small"),
        ("vision_config", "patch_size", 5),
        ("vision_config", "num_hidden_layers", 10**6),
        ("vision_config", "num_attention_heads", 5),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    saved: Path, section: str, key: str, value: object
) -> None:
    edit_config(saved, lambda config: config[section].update({key: value}))
    with pytest.raises(ValueError, match="describes a model that cannot be read"):
        open_pretrained(saved)


def test_a_tied_output_layer_is_the_embedding(saved: Path) -> None:
    expected = open_pretrained(saved).weights["language_model.embedding.word_embeddings.weight"]
    edit_config(saved, lambda config: config["text_config"].update(tie_word_embeddings=True))
    edit_tensors(saved, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    found = open_pretrained(saved)
    assert found.model.language.tie_word_embeddings
    assert "language_model.output_layer.weight" not in found.weights
    embedding = found.weights["language_model.embedding.word_embeddings.weight"]
    assert torch.equal(embedding, expected)


def test_a_foreign_model_type_is_refused(saved: Path) -> None:
    edit_config(saved, lambda config: config.update(model_type="qwen2_vl"))
    with pytest.raises(ValueError, match="model_type 'qwen2_vl' is not supported"):
        open_pretrained(saved)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"model_type": "llava"}', "\udcff", "[" * 100_000, "9" * 5000,
        '{"model_type": "llava", "text_config": {"model_type": []}, "vision_config": {}}',
    ],
    ids=range(8),
)  # fmt: skip
def test_a_broken_config_is_refused(saved: Path, text: str) -> None:
    (saved / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json"):
        open_pretrained(saved)


def test_missing_unknown_and_misshapen_tensors_are_named(saved: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["language_model.model.norm.weight"]
        tensors["language_model.model.layers.0.lora_A.weight"] = torch.zeros(2)
        tensors["multi_modal_projector.linear_2.bias"] = torch.zeros(3)

    edit_tensors(saved, spoil)
    with pytest.raises(ValueError) as error:
        open_pretrained(saved)
    for part in (
        "language_model.model.norm.weight is missing",
        "lora_A.weight is unknown",
        "linear_2.bias has shape (3,), config.json says (48,)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(saved: Path, dtype: torch.dtype) -> None:
    def quantise(tensors: dict[str, Tensor]) -> None:
        tensors["language_model.model.norm.weight"] = torch.ones(48).to(dtype)

    edit_tensors(saved, quantise)
    with pytest.raises(ValueError, match=rf"norm\.weight is {dtype}; quantised .* cannot be read"):
        open_pretrained(saved).weights["language_model.decoder.final_layernorm.weight"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nan_and_infinity_are_told_with_the_tensors_name(
    saved: Path, value: float, dtype: torch.dtype
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        norm = torch.ones(48, dtype=dtype)
        norm[7] = value
        tensors["language_model.model.norm.weight"] = norm

    edit_tensors(saved, spoil)
    weights = open_pretrained(saved).weights
    with pytest.raises(ValueError, match=r"norm\.weight holds NaN or infinity in 1 of 48 places"):
        weights["language_model.decoder.final_layernorm.weight"]


def test_a_truncated_file_is_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        open_pretrained(saved)


class Hostile:
    """Would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_bin_file_runs_no_code(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").unlink()
    torch.save({"language_model.lm_head.weight": Hostile(tmp_path / "ran")},
               saved / "pytorch_model.bin")  # fmt: skip
    with pytest.raises(ValueError, match=r"bin is not a whole file of tensors .*trust") as told:
        open_pretrained(saved)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "ran").exists()


def test_a_small_bin_file_spells_no_giant_tensor(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    giant = torch.zeros(1).expand(10**9, 48)
    torch.save({"language_model.lm_head.weight": giant}, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"does not hold every number of language_model\.lm_head"):
        open_pretrained(saved)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../outside.safetensors"}}, "only files in the same folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "only files in the same folder"),
        ({"weight_map": {"a": ".."}}, "only files in the same folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, "which is missing"),
        ({"weight_map": {"a": "config.json"}}, "neither .safetensors nor .bin"),
        ({"weight_map": {"a": 3}}, "only files in the same folder"),
        ({"weights": {}}, "is not an index"),
        ("[" * 100_000, "is not an index"),
        ([], "is not an index"),
    ],
)
def test_an_index_cannot_lead_astray(saved: Path, index: object, message: str) -> None:
    text = index if isinstance(index, str) else json.dumps(index)
    (saved / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_pretrained(saved)


def test_a_folder_without_weights_is_refused(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        open_pretrained(saved)
    with pytest.raises(ValueError, match="is not a folder"):
        open_pretrained(tmp_path / "nowhere")


def test_grouped_heads_default_to_one_group_per_head(saved: Path) -> None:
    edit_config(saved, lambda config: config["text_config"].pop("num_key_value_heads"))
    with pytest.raises(ValueError, match=r"k_proj.weight has shape \(16, 48\), .* says \(48, 48\)"):
        open_pretrained(saved)
