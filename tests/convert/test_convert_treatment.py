"""How an export says that its model is asked: as training had it; foreign ones are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_gmai.config import DataConfig
from megatron_gmai.convert.chat_template import get_format, template_name
from megatron_gmai.convert.treatment import MAX_BYTES, read_treatment
from tests.convert.conftest import Export

LLAMA3 = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("template", ["internlm2", "qwen", "llama3_chat"])
def test_an_export_is_asked_as_it_was_trained(
    export: Callable[..., Export], template: str, pad: bool
) -> None:
    symbols = LLAMA3 if template == "llama3_chat" else ["<|im_start|>", "<|im_end|>"]
    made = export(
        chat_template=template,
        pad_to_square=pad,
        sentencepiece={"user_defined_symbols": symbols, "add_dummy_prefix": pad},
    )
    treatment = read_treatment(made.folder, "transformers")
    assert get_format(treatment.chat_template) == get_format(template)
    assert treatment.pad_to_square == pad and treatment.tokenizer == str(made.folder)


def test_folders_that_say_nothing_get_the_defaults_of_training(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"crop_size": 336}))
    defaults = DataConfig(tokenizer=str(tmp_path))
    assert read_treatment(tmp_path, "original") == defaults
    assert not read_treatment(tmp_path, "transformers").pad_to_square
    (tmp_path / "preprocessor_config.json").unlink()
    assert read_treatment(tmp_path, "transformers") == defaults


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", "{{ messages[0]['content'] }}", "none of the chat templates"),
        ("chat_template.jinja", "x" * (MAX_BYTES + 1), "larger than"),
        ("preprocessor_config.json", "[]", "no image processor"),
        ("preprocessor_config.json", "{", "no image processor"),
    ],
)
def test_what_training_does_not_know_is_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_treatment(tmp_path, "transformers")


def test_a_template_of_another_model_has_no_name() -> None:
    assert template_name("{%- set openings = {} -%}") is None
