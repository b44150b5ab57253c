"""No text forges a special token, and none is read in another way than in training."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_gmai.chat_formats import chat_format
from megatron_gmai.convert.tokenizer import MARK
from megatron_gmai.data.text.conversation import parse_conversation
from megatron_gmai.data.text.template import render
from megatron_gmai.data.text.tokenizer import Tokenizer
from tests.convert.conftest import Export

# InternLM2's names, the unnamed pieces that its model file has in their place, and other families'.
INTERNLM2 = ["<|im_start|>", "<|im_end|>", "<|action_start|>", "<|action_end|>", "<|interpreter|>",
             "<|plugin|>"]  # fmt: skip
UNNAMED = [f"[UNUSED_TOKEN_{number}]" for number in (1, 141, 142, 143, 144, 145, 146)]
NAMES = [*INTERNLM2, *UNNAMED, "<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<0xFF>", "<unused7>",
         "<extra_id_0>", "<reserved_1>", "[INST]", "[PAD]", "<|eot_id|>", "[UD]"]  # fmt: skip
WORDS = ["what is the modality", " brain MR", "yes", "医学画像，", "这是什么？", "😀", "👨‍👩‍👧",
         "\n", "\t", "  ", "def f(x):\n    return x[0] | 1 > 2", "<", "|>", "|", "im_end", "[", "]",
         "\x00", "\x1f", "\x7f", "\u200b", "\u2581", "café", "e\u0301", "<|", "s>", MARK,
         f"<{MARK}|im_end|>", f"<{MARK}{MARK}s>"]  # fmt: skip
SETTINGS = {
    "named": {"user_defined_symbols": ["<|im_start|>", "<|im_end|>"]},
    "unnamed": {"user_defined_symbols": UNNAMED},
    "user-defined": {"user_defined_symbols": [*UNNAMED, "<unused7>", "[INST]", "[UD]", "\n"]},
    "declared": {"control_symbols": INTERNLM2, "user_defined_symbols": ["[UD]"]},
}


def texts(count: int) -> list[str]:
    generator = random.Random(0)
    return [
        "".join(generator.choices([*NAMES, *WORDS], k=generator.randrange(1, 9)))
        for _ in range(count)
    ]


def of_training(tokenizer: Tokenizer, turns: list[tuple[str, str]]) -> list[int]:
    record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    conversation = parse_conversation(record, 0)
    return list(render(conversation, chat_format("internlm2"), tokenizer, 16).tokens)


def of_export(tokenizer: Any, turns: list[tuple[str, str]]) -> list[int]:
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    messages = [{"role": roles[who], "content": text} for who, text in turns]
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("dummy_prefix", [True, False])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_any_text_has_the_ids_of_training(
    export: Callable[..., Export], model_type: str, dummy_prefix: bool, settings: dict[str, Any]
) -> None:
    changes = {"model_type": model_type, "add_dummy_prefix": dummy_prefix, **settings}
    written = export(sentencepiece=changes)
    tokenizer = AutoTokenizer.from_pretrained(written.folder, local_files_only=True)
    specials = {written.tokenizer.special_id(name) for name in ("<|im_start|>", "<|im_end|>")}
    every = [*map("a {} b".format, NAMES), *NAMES, *texts(300)]
    for text in every:
        if not text.strip():
            continue
        turns = [("system", text), ("human", f"{text}?"), ("gpt", f"so {text}")]
        ids = of_export(tokenizer, turns)
        assert ids == of_training(written.tokenizer, turns), repr(text)
        reserved = [number for number in ids if number in written.tokenizer.reserved]
        assert set(reserved) == specials
        assert len(reserved) == 6


def test_other_roles_cannot_forge_an_image(export: Callable[..., Export]) -> None:
    written = export()
    tokenizer = AutoTokenizer.from_pretrained(written.folder, local_files_only=True)
    text = "see <image>"
    ids = of_export(tokenizer, [("system", text), ("gpt", text)])
    assert written.tokenizer.image_token_id not in ids
    literal = [*written.tokenizer.encode(text), written.tokenizer.special_id("<|im_end|>")]
    assert any(ids[at : at + len(literal)] == literal for at in range(len(ids)))
