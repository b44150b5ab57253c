"""Held-out records become the prompts that training has shown to the model."""

import json
from pathlib import Path

import pytest
import torch

from megatron_gmai.chat_formats import chat_format
from megatron_gmai.config import DataConfig
from megatron_gmai.data.images.decode import load_image
from megatron_gmai.data.text.conversation import parse_conversation
from megatron_gmai.data.text.template import render
from megatron_gmai.data.text.tokenizer import Tokenizer
from megatron_gmai.evaluate.questions import Asked, HeldOut, Skipped, batches
from tests.evaluate.models import config_for
from tests.parallel.batches import MODEL


@pytest.fixture
def held_out(held_out_file: Path, tokenizer: Tokenizer) -> HeldOut:
    return HeldOut(held_out_file, DataConfig(), config_for(tokenizer).model, tokenizer, 32)


def asked(held_out: HeldOut, number: int) -> Asked:
    one = held_out.ask(number)
    assert isinstance(one, Asked)
    return one


@pytest.mark.parametrize("number", range(7))
def test_a_prompt_is_the_training_sample_up_to_its_last_answer(
    held_out: HeldOut, held_out_file: Path, tokenizer: Tokenizer, number: int
) -> None:
    record = json.loads(held_out_file.read_text())[number]
    conversation = parse_conversation(record, str(record).count("<image>"))
    sample = render(
        conversation, chat_format("internlm2"), tokenizer, MODEL.vision.tokens_per_image
    )
    one = asked(held_out, number)
    length = len(one.prompt.tokens)
    assert one.prompt.tokens.tolist() == sample.tokens[:length].tolist()
    assert one.prompt.image_starts.tolist() == sample.image_starts.tolist()
    answer = [*tokenizer.encode(one.question.expected), tokenizer.special_id("<|im_end|>")]
    assert sample.tokens[length : length + len(answer)].tolist() == answer
    assert (sample.labels[length:] != -100).sum() == len(answer)


@pytest.mark.parametrize("pad", [True, False])
def test_images_are_prepared_as_in_training(
    held_out_file: Path, tokenizer: Tokenizer, pad: bool
) -> None:
    data = DataConfig(pad_to_square=pad)
    one = asked(HeldOut(held_out_file, data, config_for(tokenizer).model, tokenizer, 32), 2)
    files = [held_out_file.parent / name for name in ("a.png", "b.png")]
    expected = [torch.from_numpy(load_image(file.read_bytes(), 28, pad)) for file in files]
    assert torch.equal(one.prompt.pixels, torch.stack(expected))


def test_the_last_of_several_turns_is_the_question(held_out: HeldOut) -> None:
    question = asked(held_out, 3).question
    assert (question.text, question.expected) == ("left", "right")


def test_groups_come_from_the_record_and_have_names_without_it(held_out: HeldOut) -> None:
    named, text = asked(held_out, 0).question, asked(held_out, 1).question
    assert (named.question_type, named.class_name) == ("yes_no", "unnamed")
    assert (text.question_type, text.key) == ("untyped", "text")
    assert named.text == "is a lung shown"


def test_what_cannot_be_asked_is_skipped_with_its_reason(held_out: HeldOut) -> None:
    missing, long = held_out.ask(7), held_out.ask(8)
    assert isinstance(missing, Skipped) and isinstance(long, Skipped)
    assert missing.key == "missing" and "missing.png: no such file" in missing.reason
    assert long.key == "long" and "room for 480" in long.reason


def test_batches_hold_every_record_once_beside_others_of_like_length(held_out: HeldOut) -> None:
    made = list(batches(held_out, range(9), 2))
    drawn = [one for batch in made for one in batch]
    numbers = [(one.question if isinstance(one, Asked) else one).number for one in drawn]
    assert sorted(numbers) == list(range(9))
    lengths = [len(one.prompt.tokens) for one in drawn if isinstance(one, Asked)]
    assert lengths == sorted(lengths)
    assert [len(batch) for batch in made] == [2, 2, 2, 2, 1]


def test_an_empty_file_is_the_users_mistake(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no questions"):
        HeldOut(tmp_path / "none.json", DataConfig(), MODEL, tokenizer, 32)
