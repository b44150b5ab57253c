"""Templates, token by token: what the model sees and what it is asked to predict."""

import numpy as np
import pytest

from megatron_gmai.chat_formats import chat_format
from megatron_gmai.config import IGNORE_INDEX
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.text.conversation import Conversation, parse_conversation
from megatron_gmai.data.text.template import Rendered, fit, render
from megatron_gmai.data.text.tokenizer import Tokenizer
from tests.data.world import record

IMAGE_TOKENS = 4


def conversation(*turns: tuple[str, str], images: int = 0) -> Conversation:
    items = [{"from": speaker, "value": value} for speaker, value in turns]
    return parse_conversation({"conversations": items}, images, require_answer=False)


def internlm2(tokenizer: Tokenizer, spoken: Conversation) -> Rendered:
    return render(spoken, chat_format("internlm2"), tokenizer, IMAGE_TOKENS)


def test_internlm2_with_system_image_and_two_turns(tokenizer: Tokenizer) -> None:
    spoken = conversation(
        ("system", "a scan"),
        ("human", "<image>\nwhat is shown"),
        ("gpt", "the brain"),
        ("human", "left"),
        ("gpt", "no"),
        images=1,
    )
    start, end = [tokenizer.special_id("<|im_start|>")], [tokenizer.special_id("<|im_end|>")]
    text = tokenizer.encode
    image = [tokenizer.image_token_id] * IMAGE_TOKENS
    opening = start + text("assistant\n")
    parts = [
        (start + text("system\na scan") + end + text("\n"), False),
        (start + text("user\n") + image + text("\nwhat is shown") + end + text("\n"), False),
        (opening, False),
        (text("the brain") + end, True),
        (text("\n") + start + text("user\nleft") + end + text("\n") + opening, False),
        (text("no") + end, True),
        (text("\n"), False),
    ]
    rendered = internlm2(tokenizer, spoken)
    tokens = [token for ids, _ in parts for token in ids]
    labels = [token if supervised else IGNORE_INDEX for ids, supervised in parts for token in ids]
    assert rendered.tokens.tolist() == tokens
    assert rendered.labels.tolist() == labels
    assert rendered.image_starts.tolist() == [tokens.index(tokenizer.image_token_id)]


def test_supervised_tokens_are_the_answers_and_their_ends(tokenizer: Tokenizer) -> None:
    rendered = internlm2(
        tokenizer, conversation(("human", "what"), ("gpt", "yes"), ("human", "of"), ("gpt", "no"))
    )
    supervised = rendered.tokens[rendered.labels != IGNORE_INDEX]
    assert tokenizer.decode(supervised.tolist()) == "yes<|im_end|>no<|im_end|>"


def test_a_prompt_is_the_beginning_of_what_training_saw(tokenizer: Tokenizer) -> None:
    prompt = internlm2(tokenizer, conversation(("human", "<image>\nwhat"), images=1))
    trained = internlm2(
        tokenizer, conversation(("human", "<image>\nwhat"), ("gpt", "yes"), images=1)
    )
    assert trained.tokens[: len(prompt.tokens)].tolist() == prompt.tokens.tolist()
    assert trained.labels[len(prompt.tokens)] != IGNORE_INDEX
    assert (prompt.labels == IGNORE_INDEX).all()


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ("what is shown\n<image>", "<image>\nwhat is shown"),
        ("<image>what is shown", "<image>\nwhat is shown"),
        ("<image>\n<image>\nwhat", "<image>\n<image>\nwhat"),
        ("the <image> of <image> here", "the <image> of <image> here"),
    ],
)
def test_images_come_before_the_text_unless_words_surround_them(written: str, seen: str) -> None:
    images = written.count("<image>")
    assert conversation(("human", written), images=images).turns[0].text == seen


def test_qwen_and_internlm2_agree_where_the_tokens_do(tokenizer: Tokenizer) -> None:
    spoken = conversation(("system", "a"), ("human", "what"), ("gpt", "yes"))
    qwen = render(spoken, chat_format("qwen"), tokenizer, IMAGE_TOKENS)
    assert qwen.tokens.tolist() == internlm2(tokenizer, spoken).tokens.tolist()


def test_llama3_headers(tokenizer_file, tmp_path) -> None:
    model = tokenizer_file.read_bytes()
    base = Tokenizer(model).vocab_size
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = Tokenizer(model, {name: base + i for i, name in enumerate(names)})
    rendered = render(
        conversation(("human", "what"), ("gpt", "yes")), chat_format("llama3_chat"), tokenizer, 4
    )
    assert tokenizer.decode(rendered.tokens.tolist()) == (
        "<|start_header_id|>user<|end_header_id|>\n\nwhat<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>"
    )


def test_unknown_template_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="internlm2, qwen, llama3_chat"):
        chat_format("vicuna")


class TestLongSamples:
    """Longer than max_length: cut behind an answer, or refused; an image is never cut."""

    def rendered(self, tokenizer: Tokenizer, second: str = "left") -> Rendered:
        images = 1 + second.count("<image>")
        turns = [("human", "<image>\nwhat"), ("gpt", "yes"), ("human", second), ("gpt", "no")]
        return internlm2(tokenizer, conversation(*turns, images=images))

    def test_a_sample_that_fits_is_untouched(self, tokenizer: Tokenizer) -> None:
        whole = self.rendered(tokenizer)
        assert fit(whole, len(whole.tokens)) is whole

    def test_is_cut_behind_the_last_answer_that_fits(self, tokenizer: Tokenizer) -> None:
        whole = self.rendered(tokenizer)
        cut = fit(whole, len(whole.tokens) - 2)
        assert tokenizer.decode(cut.tokens.tolist()).endswith("yes<|im_end|>")
        assert cut.tokens.tolist() == whole.tokens[: len(cut.tokens)].tolist()
        assert len(cut.image_starts) == 1

    def test_is_refused_if_no_answer_fits(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(BadSample, match="--max-length 10"):
            fit(self.rendered(tokenizer), 10)

    def test_is_refused_if_an_image_would_be_lost(self, tokenizer: Tokenizer) -> None:
        whole = self.rendered(tokenizer, "<image>\nleft")
        with pytest.raises(BadSample, match="2 image"):
            fit(whole, len(whole.tokens) - 2)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no conversations"),
        ([("gpt", "yes")], "expected the user"),
        ([("human", "what")], "no answer"),
        ([("human", "what"), ("human", "of"), ("gpt", "yes")], "expected the assistant"),
        ([("human", "what"), ("gpt", " ")], "turn 1 .* is empty"),
        ([("human", "what"), ("gpt", "a <image>")], "belong to human turns"),
        ([("narrator", "what"), ("gpt", "yes")], "'narrator'"),
        ([("human", None), ("gpt", "yes")], "turn 0 has no text"),
        ([("human", "\ud800"), ("gpt", "yes")], "surrogate"),
        ([("system", "a")], "no human turn"),
    ],
)
def test_conversations_that_cannot_be_used_say_why(turns: list, reason: str) -> None:
    items = [{"from": speaker, "value": value} for speaker, value in turns]
    with pytest.raises(BadSample, match=reason):
        parse_conversation({"conversations": items}, 0)


@pytest.mark.parametrize(("tags", "images"), [(2, 1), (1, 2), (0, 1), (1, 0)])
def test_image_tags_and_images_must_agree(tags: int, images: int) -> None:
    with pytest.raises(BadSample, match=rf"{tags} <image> in the text, but {images} image"):
        parse_conversation(record("<image>" * tags + " what", "yes"), images)


def test_labels_are_tokens_or_ignored(tokenizer: Tokenizer) -> None:
    rendered = internlm2(tokenizer, conversation(("human", "what"), ("gpt", "yes")))
    supervised = rendered.labels != IGNORE_INDEX
    assert np.array_equal(rendered.labels[supervised], rendered.tokens[supervised])
