"""Tokenizer and image-processor files of an export."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gmai.config import CLIP_MEAN, CLIP_STD, ModelConfig
from megatron_gmai.convert.chat_template import get_format, jinja_template
from megatron_gmai.convert.sentencepiece_model import SentencePieceModel, read_sentencepiece
from megatron_gmai.convert.tokenizer import IMAGE_TOKEN, added_token, tokenizer_json

_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


@dataclass(frozen=True)
class ProcessorFiles:
    """Contents by file name: JSON values and texts; the ids that the model config repeats."""

    json: dict[str, Any]
    text: dict[str, str]
    special_ids: dict[str, int | None]  # bos, eos, pad
    stop_ids: list[int]  # what ends a generation


def processor_files(
    model: ModelConfig,
    tokenizer_model: Path,
    special_tokens: Mapping[str, int],
    reserved: Collection[int],
    chat_template: str,
    pad_to_square: bool,
) -> ProcessorFiles:
    """All files that `AutoProcessor` and `AutoTokenizer` read.

    Raises ValueError if the tokenizer and the model do not fit each other, or if the tokenizer
    lacks what the chat template needs.
    """
    pieces = read_sentencepiece(tokenizer_model, reserved)
    form = get_format(chat_template)
    _check_fit(model, pieces, special_tokens, form.end_of_answer)
    ids = _special_ids(pieces)
    template = jinja_template(chat_template, special_tokens, pieces.add_dummy_prefix)
    image = image_processor(model, pad_to_square)
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": model.vision.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": IMAGE_TOKEN,
    }
    names = _special_names(pieces, ids)
    return ProcessorFiles(
        json={
            "tokenizer.json": tokenizer_json(pieces, special_tokens, form.opening_text),
            "tokenizer_config.json": {
                **_tokenizer_config(model, special_tokens, names),
                # For a tokenizer on its own before transformers 4.50, which knows no .jinja file.
                "chat_template": template,
            },
            "special_tokens_map.json": names,
            "processor_config.json": processor,
            # A file of its own: transformers 4 fails on it inside processor_config.json.
            "preprocessor_config.json": {**image, "processor_class": "LlavaProcessor"},
        },
        text={"chat_template.jinja": template},
        special_ids=ids,
        stop_ids=sorted({special_tokens[form.end_of_answer], *_present(ids["eos"])}),
    )


def image_processor(model: ModelConfig, pad_to_square: bool) -> dict[str, Any]:
    """CLIP's preprocessing; padding to a square with the mean colour needs LLaVA's processor."""
    side = model.vision.image_size
    return {
        "image_processor_type": "LlavaImageProcessor" if pad_to_square else "CLIPImageProcessor",
        **({"do_pad": True} if pad_to_square else {}),
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }


def _check_fit(
    model: ModelConfig,
    pieces: SentencePieceModel,
    special_tokens: Mapping[str, int],
    end_of_answer: str,
) -> None:
    vocabulary = model.language.vocab_size
    size = max(len(pieces.pieces), *(number + 1 for number in special_tokens.values()))
    if size > vocabulary:
        raise ValueError(
            f"the tokenizer has {size} ids, the model only {vocabulary} rows; give the tokenizer "
            "that it was trained with"
        )
    if special_tokens.get(IMAGE_TOKEN) != model.image_token_id:
        raise ValueError(
            f"the model's image token is {model.image_token_id}, the tokenizer's "
            f"{special_tokens.get(IMAGE_TOKEN)}; give the tokenizer that it was trained with"
        )
    if end_of_answer not in special_tokens:
        raise ValueError(f"the chat template needs {end_of_answer}, which the tokenizer lacks")


def _special_ids(pieces: SentencePieceModel) -> dict[str, int | None]:
    ids = {"bos": pieces.bos_id, "eos": pieces.eos_id, "pad": pieces.pad_id}
    if pieces.pad_id < 0:
        ids["pad"] = pieces.eos_id
    return {key: number if number >= 0 else None for key, number in ids.items()}


def _present(number: int | None) -> list[int]:
    return [] if number is None else [number]


def _special_names(pieces: SentencePieceModel, ids: dict[str, int | None]) -> dict[str, str]:
    return {f"{k}_token": pieces.pieces[i].text for k, i in ids.items() if i is not None}


def _tokenizer_config(
    model: ModelConfig, special_tokens: Mapping[str, int], names: dict[str, str]
) -> dict[str, Any]:
    # No unk_token here: declared, it would make the text "<unk>" a special token.
    entries = {str(number): added_token(name, number) for name, number in special_tokens.items()}
    for entry in entries.values():
        del entry["id"]
    return {
        # The generic class keeps tokenizer.json as it is; LlamaTokenizer would rebuild it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        **names,
        "added_tokens_decoder": entries,
        # Llava takes no token_type_ids, which transformers 4 would make by default; a batch of
        # prompts has to end together, or generation goes on from padding.
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.language.max_position_embeddings,
    }
