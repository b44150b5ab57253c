"""config.json of every source -> `ModelConfig`; `export_configs.py` is the way back.

The files hold only what differs from the defaults of the config classes, so each reader starts
from those defaults. What this model cannot express (another activation, biases, scaled RoPE, …)
is refused, all problems in one ValueError.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gmai.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_gmai.convert.mapping import Flavour
from megatron_gmai.convert.rope import read_rope

FLAVOURS: dict[str, Flavour] = {"llama": "transformers", "internlm2": "original"}
# Why a language model of a kind that users may try cannot be expressed.
_REFUSED = {
    "qwen2": "its query, key and value projections have biases, which this model does not have",
    "qwen3": "it normalises queries and keys, which this model does not do",
    "mistral": "its attention window is not part of this model",
}

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
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_FLAVOUR_DEFAULTS: dict[Flavour, dict[str, Any]] = {
    "transformers": {"vocab_size": 32000, "attention_bias": False, "mlp_bias": False},
    "original": {"vocab_size": 103168, "bias": True},
}
# What joins the towers: the only values that this model has.
LLAVA_SETTINGS = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
_IMAGE_TOKEN_DEFAULT = 32000
# A table of all weights is made before any file is opened, and a short config.json could ask for
# one that no memory holds.
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Described:
    """What the config files of a source say."""

    model: ModelConfig
    flavour: Flavour


def read_config(folder: Path) -> Described:
    """Sizes and flavour of a whole model, from its config.json.

    Raises ValueError listing everything in the file that this model cannot express.
    """
    path = folder / "config.json"
    raw = _read_json(path)
    if raw.get("model_type") not in ("llava", "enhanced_llava"):
        raise ValueError(
            f"{path}: model_type {raw.get('model_type')!r} is not supported; expected llava or "
            "enhanced_llava. For a language model and CLIP in two folders use --llm and --vision"
        )
    flavour, text = _text(path, {"model_type": "llama", **_section(path, raw, "text_config")})
    vision = {**_CLIP_DEFAULTS, **_section(path, raw, "vision_config")}
    problems = [*_llava_problems(raw), *_text_problems(text, "text_config.")]
    problems += _vision_problems(vision, "vision_config.")
    _refuse(path, problems)
    model = ModelConfig(_vision(vision), _language(text), image_token_id=_image_token(raw))
    return Described(model, flavour)


def read_separate_configs(llm: Path, vision: Path) -> Described:
    """Sizes of a language model and a CLIP in two folders; the image token is not known yet.

    Raises ValueError listing everything in either config.json that this model cannot express.
    """
    flavour, text = _text(llm / "config.json", _read_json(llm / "config.json"))
    raw = _read_json(vision / "config.json")
    if raw.get("model_type") == "clip":  # with its text tower
        raw = _section(vision / "config.json", raw, "vision_config")
    elif raw.get("model_type") != "clip_vision_model":
        raise ValueError(
            f"{vision / 'config.json'}: model_type {raw.get('model_type')!r} is not supported; "
            "expected clip or clip_vision_model"
        )
    raw = {**_CLIP_DEFAULTS, **raw}
    _refuse(llm / "config.json", _text_problems(text, ""))
    _refuse(vision / "config.json", _vision_problems(raw, ""))
    model = ModelConfig(_vision(raw), _language(text))
    return Described(model, flavour)


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{path} describes a model that cannot be read: " + "; ".join(problems))


def _text(path: Path, raw: dict[str, Any]) -> tuple[Flavour, dict[str, Any]]:
    """Flavour and settings of a text config, defaults filled in."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FLAVOURS:
        reason = _REFUSED.get(str(kind), f"expected {' or '.join(FLAVOURS)}")
        raise ValueError(f"{path}: a language model of type {kind!r} is not supported: {reason}")
    flavour = FLAVOURS[kind]
    return flavour, {**_LANGUAGE_DEFAULTS, **_FLAVOUR_DEFAULTS[flavour], **raw}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name the folder that holds config.json")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
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
    rope, _ = read_rope(raw)
    return LanguageConfig(
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        num_attention_heads=raw["num_attention_heads"],
        num_query_groups=_query_groups(raw),
        ffn_hidden_size=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        rmsnorm_eps=raw["rms_norm_eps"],
        rope_theta=rope.theta,
        rope_scaling_factor=rope.factor,
        max_position_embeddings=raw["max_position_embeddings"],
        tie_word_embeddings=bool(raw["tie_word_embeddings"]),
    )


def _query_groups(raw: dict[str, Any]) -> int:
    groups = raw.get("num_key_value_heads")
    return raw["num_attention_heads"] if groups is None else groups


def _image_token(raw: dict[str, Any]) -> int:
    return raw.get("image_token_index", raw.get("image_token_id", _IMAGE_TOKEN_DEFAULT))


def _llava_problems(raw: dict[str, Any]) -> list[str]:
    problems = [
        f"{key} is {raw[key]!r}, only {value!r} works"
        for key, value in LLAVA_SETTINGS.items()
        if raw.get(key, value) != value
    ]
    token = _image_token(raw)
    if type(token) is not int or token < 0:
        problems.append(f"image_token_index is {token!r}, expected an id")
    if raw.get("image_token_id", token) != token:  # transformers 5's name for the same
        problems.append(f"image_token_index is {token}, image_token_id {raw['image_token_id']}")
    return problems


def _text_problems(text: dict[str, Any], prefix: str) -> list[str]:
    sizes = ("vocab_size", "max_position_embeddings")
    problems = _size_problems(text, prefix, sizes, "rms_norm_eps")
    if not problems:
        problems = _head_problems(text, prefix)
    if text["hidden_act"] != "silu":
        problems.append(f"{prefix}hidden_act is {text['hidden_act']!r}, only 'silu' works")
    for key in ("bias", "attention_bias", "mlp_bias"):
        if text.get(key):
            problems.append(f"{prefix}{key} is true (InternLM2's default), only false works")
    return problems + [f"{prefix}{problem}" for problem in read_rope(text)[1]]


def _vision_problems(vision: dict[str, Any], prefix: str) -> list[str]:
    problems = _size_problems(vision, prefix, ("image_size", "patch_size"), "layer_norm_eps")
    for key, value in (("hidden_act", "quick_gelu"), ("num_channels", 3)):
        if vision[key] != value:
            problems.append(f"{prefix}{key} is {vision[key]!r}, only {value!r} works")
    if problems:
        return problems
    if vision["hidden_size"] % vision["num_attention_heads"]:
        problems.append(f"{prefix}hidden_size does not divide by its heads")
    if vision["image_size"] % vision["patch_size"]:
        problems.append(f"{prefix}image_size does not divide by patch_size")
    return problems


def _size_problems(
    section: dict[str, Any], prefix: str, more: tuple[str, ...], eps: str
) -> list[str]:
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", *more)
    problems = [
        f"{prefix}{key} is {section[key]!r}, expected a positive integer"
        for key in sizes
        if type(section[key]) is not int or section[key] < 1
    ]
    if not problems and section["num_hidden_layers"] > _MOST_LAYERS:
        problems.append(
            f"{prefix}num_hidden_layers is {section['num_hidden_layers']}, more than {_MOST_LAYERS}"
        )
    if type(section[eps]) not in (int, float) or not 0 < section[eps] < 1:
        problems.append(f"{prefix}{eps} is {section[eps]!r}, expected a number above 0 and below 1")
    return problems


def _head_problems(text: dict[str, Any], prefix: str) -> list[str]:
    heads, hidden, groups = text["num_attention_heads"], text["hidden_size"], _query_groups(text)
    if type(groups) is not int or groups < 1:
        return [f"{prefix}num_key_value_heads is {groups!r}"]
    if hidden % heads or heads % groups:
        return [f"{prefix}: {hidden} hidden, {heads} heads, {groups} groups do not fit"]
    if text.get("head_dim") not in (None, hidden // heads):
        return [f"{prefix}head_dim is {text['head_dim']}, only {hidden // heads} works"]
    return []
