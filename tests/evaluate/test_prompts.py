"""How questions are put, word by word."""

from dataclasses import replace

import pytest

from megatron_gmai.evaluate.prompts import ask, without_tags
from tests.evaluate.tables import item

CHOICE = replace(item("B", {"A": "CT", "B": "MRI"}), hint="An image.")
OPEN = item("left lung")
TAG = "<image>\n"


@pytest.mark.parametrize(
    ("style", "text"),
    [
        (
            "vlmevalkit",
            "Hint: An image.\nQuestion: What is shown?\nOptions:\nA. CT\nB. MRI\n"
            "Please select the correct answer from the options above. \n",
        ),
        (
            "llava",
            "An image.\nWhat is shown?\nA. CT\nB. MRI\n"
            "Answer with the option's letter from the given choices directly.",
        ),
        ("plain", "An image.\nWhat is shown?\nA. CT\nB. MRI\nAnswer with the letter."),
    ],
)
def test_a_choice(style: str, text: str) -> None:
    assert ask(CHOICE, "Set", style, 1).text == TAG + text


def test_questions_without_options() -> None:
    single = "What is shown?\nAnswer the question using a single word or phrase."
    assert ask(OPEN, "Set", "vlmevalkit", 2).text == TAG * 2 + single
    assert ask(OPEN, "Set", "llava", 1).text == TAG + single
    assert ask(OPEN, "Set", "plain", 0).text == "What is shown?"
    assert ask(item("Yes"), "Set", "vlmevalkit", 1).text == TAG + "What is shown?"
    assert ask(OPEN, "PathVQA", "vlmevalkit", 1).text.endswith("short answer to the question. ")


def test_a_chinese_choice_is_asked_for_in_chinese() -> None:
    chinese = replace(CHOICE, question="图中是什么?")
    assert ask(chinese, "Set", "llava", 1).text.endswith("\n请直接回答选项字母。")


def test_images_of_mmmu_stand_where_the_text_names_them() -> None:
    question = replace(CHOICE, question="Compare <image 2> with <image 1>, not <image 2>.", hint="")
    asking = ask(question, "MMMU_Health_Medicine", "vlmevalkit", 2)
    assert asking.images == (1, 0, 1)
    assert "Question: Compare <image> with <image>, not <image>.\n" in asking.text
    elsewhere = ask(question, "Set", "vlmevalkit", 2)
    assert elsewhere.images == (0, 1) and "<image 2>" in elsewhere.text


def test_a_tag_in_a_question_is_no_image() -> None:
    for question in ("What is <image>?", "What is <<image>>?"):
        asking = ask(replace(OPEN, question=question), "Set", "plain", 1)
        assert asking.text == TAG + "What is image?"


def test_a_text_of_brackets_takes_no_longer_than_another() -> None:
    assert without_tags("<" * 300_000) == "<" * 300_000


def test_an_unknown_style_is_told() -> None:
    with pytest.raises(ValueError, match="known are vlmevalkit, llava, plain"):
        ask(OPEN, "Set", "other", 1)
