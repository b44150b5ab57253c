"""config.json of both flavours <-> `ModelConfig`.

The files hold only what differs from the defaults of the config classes, so each reader starts
from those defaults. What this model cannot express (another activation, biases, scaled RoPE, …)
is refused, all problems in one ValueError.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_gmai.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_gmai.convert.mapping import Flavour

FLAVOURS: dict[str, Flavour] = {"llama": "transformers", "internlm2": "original"}

# Class defaults of the two config families, for keys that the file leaves out.
_CLIP_DEFAULTS = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 32,
    "image_size": 224,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
    "num_channels": 3,
}
_LANGUAGE_DEFAULTS = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_FLAVOUR_DEFAULTS: dict[Flavour, dict[str, Any]] = {
    "transformers": {"vocab_size": 32000, "attention_bias": False, "mlp_bias": False},
    "original": {"vocab_size": 103168, "bias": True},
}
_LLAVA_DEFAULTS = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def read_config(folder: Path) -> tuple[ModelConfig, Flavour]:
    """Sizes and flavour of the checkpoint in `folder`, from its config.json.

    Raises ValueError listing everything in the file that this model cannot express.
    """
    path = folder / "config.json"
    raw = _read_json(path)
    text = {"model_type": "llama", **_section(path, raw, "text_config")}
    vision = {**_CLIP_DEFAULTS, **_section(path, raw, "vision_config")}
    if raw.get("model_type") not in ("llava", "enhanced_llava") or (
        text["model_type"] not in FLAVOURS
    ):
        raise ValueError(
            f"{path}: model_type {raw.get('model_type')!r} with text model "
            f"{text['model_type']!r} is not supported; expected llava or enhanced_llava over "
            "llama or internlm2"
        )
    flavour = FLAVOURS[text["model_type"]]
    text = {**_LANGUAGE_DEFAULTS, **_FLAVOUR_DEFAULTS[flavour], **text}
    raw = {**_LLAVA_DEFAULTS, **raw}
    problems = _problems(raw, text, vision)
    if problems:
        raise ValueError(f"{path} describes a model that cannot be read: " + "; ".join(problems))
    token = raw.get("image_token_id", raw["image_token_index"])
    return ModelConfig(_vision(vision), _language(text), image_token_id=token), flavour


def hf_config(
    model: ModelConfig, dtype: str, special_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """config.json of the transformers flavour, spelled so that 4.46 and 5.x both read it.

    `special_ids` holds `bos`, `eos` and `pad` of the tokenizer.
    """
    vision, language = model.vision, model.language
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": dtype,
        "image_token_index": model.image_token_id,
        "image_seq_length": vision.tokens_per_image,
        "tie_word_embeddings": False,
        **{key: _LLAVA_DEFAULTS[key] for key in _LLAVA_DEFAULTS if key != "image_token_index"},
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": language.vocab_size,
            "hidden_size": language.hidden_size,
            "intermediate_size": language.ffn_hidden_size,
            "num_hidden_layers": language.num_layers,
            "num_attention_heads": language.num_attention_heads,
            "num_key_value_heads": language.num_query_groups,
            "head_dim": language.hidden_size // language.num_attention_heads,
            "hidden_act": "silu",
            "rms_norm_eps": language.rmsnorm_eps,
            # Spelled as before transformers 5, which still reads it; 4.46 reads nothing else.
            "rope_theta": language.rope_theta,
            "rope_scaling": None,
            "max_position_embeddings": language.max_position_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": dtype,
            "bos_token_id": special_ids["bos"],
            "eos_token_id": special_ids["eos"],
            "pad_token_id": special_ids["pad"],
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.ffn_hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": 3,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": vision.layernorm_eps,
            "projection_dim": vision.hidden_size,
            "torch_dtype": dtype,
        },
    }


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name the folder that holds config.json")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _section(path: Path, raw: dict[str, Any], key: str) -> dict[str, Any]:
    section = raw.get(key)
    if not isinstance(section, dict):
        raise ValueError(f"{path}: {key!r} is missing or not an object")
    return section


def _vision(raw: dict[str, Any]) -> VisionConfig:
    return VisionConfig(
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        num_attention_heads=raw["num_attention_heads"],
        ffn_hidden_size=raw["intermediate_size"],
        patch_size=raw["patch_size"],
        image_size=raw["image_size"],
        layernorm_eps=raw["layer_norm_eps"],
    )


def _language(raw: dict[str, Any]) -> LanguageConfig:
    return LanguageConfig(
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        num_attention_heads=raw["num_attention_heads"],
        num_query_groups=_query_groups(raw),
        ffn_hidden_size=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        rmsnorm_eps=raw["rms_norm_eps"],
        rope_theta=float(_rope(raw).get("rope_theta", raw["rope_theta"])),
        max_position_embeddings=raw["max_position_embeddings"],
    )


def _query_groups(raw: dict[str, Any]) -> int:
    groups = raw.get("num_key_value_heads")
    return raw["num_attention_heads"] if groups is None else groups


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` (transformers 5) or `rope_scaling` (before); empty when plain."""
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def _problems(raw: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> list[str]:
    """Everything that the file asks for and this model does not do."""
    problems = _size_problems(text, vision)
    wanted = (
        (raw, "", {key: _LLAVA_DEFAULTS[key] for key in list(_LLAVA_DEFAULTS)[1:]}),
        (text, "text_config.", {"hidden_act": "silu", "tie_word_embeddings": False}),
        (vision, "vision_config.", {"hidden_act": "quick_gelu", "num_channels": 3}),
    )
    for section, prefix, values in wanted:
        for key, value in values.items():
            if section[key] != value:
                problems.append(f"{prefix}{key} is {section[key]!r}, only {value!r} works")
    for key in ("bias", "attention_bias", "mlp_bias"):
        if text.get(key):
            problems.append(f"text_config.{key} is true (InternLM2's default), only false works")
    rope = _rope(text)
    kind = rope.get("rope_type", rope.get("type", "default"))
    # Dynamic NTK equals plain RoPE up to max_position_embeddings, and this model stops there.
    if kind not in ("default", "dynamic"):
        problems.append(f"text_config asks for {kind!r} RoPE, only plain and dynamic work")
    return problems


def _size_problems(text: dict[str, Any], vision: dict[str, Any]) -> list[str]:
    problems = []
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    for name, section, more in (
        ("text_config", text, ("vocab_size", "max_position_embeddings")),
        ("vision_config", vision, ("image_size", "patch_size")),
    ):
        for key in (*sizes, *more):
            if type(section[key]) is not int or section[key] < 1:
                problems.append(f"{name}.{key} is {section[key]!r}, expected a positive integer")
    if type(_query_groups(text)) is not int or _query_groups(text) < 1:
        problems.append(f"text_config.num_key_value_heads is {_query_groups(text)!r}")
    if problems:
        return problems
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    if hidden % heads or heads % _query_groups(text):
        problems.append(f"{hidden} hidden, {heads} heads, {_query_groups(text)} groups do not fit")
    elif text.get("head_dim") not in (None, hidden // heads):
        problems.append(f"text_config.head_dim is {text['head_dim']}, only {hidden // heads} works")
    if vision["hidden_size"] % vision["num_attention_heads"]:
        problems.append("vision_config.hidden_size does not divide by its heads")
    if vision["image_size"] % vision["patch_size"]:
        problems.append("vision_config.image_size does not divide by patch_size")
    return problems
