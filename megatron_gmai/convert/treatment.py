"""What a Hugging Face folder says about how its model is asked: chat template, shape of images."""

import json
from dataclasses import replace
from pathlib import Path

from megatron_gmai.chat_formats import CHAT_FORMATS
from megatron_gmai.config import DataConfig
from megatron_gmai.convert.chat_template import template_name
from megatron_gmai.convert.mapping import Flavour

MAX_BYTES = 2**20
_PROCESSOR, _TEMPLATE = "preprocessor_config.json", "chat_template.jinja"


def read_treatment(folder: Path, flavour: Flavour) -> DataConfig:
    """Tokenizer, chat template and padding as an export of this project states them.

    GMAI-VL's own files, of the original flavour, leave both to its code: they get the defaults of
    training. Raises ValueError for a chat template that training does not know.
    """
    template = _chat_template(folder / _TEMPLATE)
    treatment = DataConfig(tokenizer=str(folder), chat_template=template)
    if flavour == "original" or not (folder / _PROCESSOR).is_file():
        return treatment
    return replace(treatment, pad_to_square=_pads(folder / _PROCESSOR))


def _chat_template(path: Path) -> str:
    if not path.is_file():
        return DataConfig().chat_template
    name = template_name(_read(path))
    if name is None:
        raise ValueError(
            f"{path} is none of the chat templates that training knows ({', '.join(CHAT_FORMATS)})"
        )
    return name


def _pads(path: Path) -> bool:
    try:
        settings = json.loads(_read(path))
        return bool(settings.get("do_pad", False))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no image processor: {error}") from error


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES} bytes")
    return path.read_text(encoding="utf-8")
