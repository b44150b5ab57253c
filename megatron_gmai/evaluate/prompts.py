"""How a benchmark's question is put to the model. The choice moves scores by points.

`vlmevalkit` asks as VLMEvalKit does where a model has no prompt of its own, `llava` as it does for
LLaVA's models, `plain` adds nothing but options and a short request for the letter.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_gmai.data.text.conversation import IMAGE_TAG
from megatron_gmai.evaluate.benchmarks.table import Item

# The tag with all brackets around it, lest what is left of "<<image>>" be one; from the first
# bracket of a row on and never back, lest a text of brackets take quadratic time.
_TAG = re.compile("(?<!<)<++image>++")
_NAMED_IMAGE = re.compile(r"<image (\d)>")
_CHINESE = re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Asking:
    """The user's text with a tag for each image, and which image each tag stands for."""

    text: str
    images: tuple[int, ...]  # places among the question's images


def ask(item: Item, benchmark: str, style: str, images: int) -> Asking:
    """Puts a question about so many images. Raises ValueError for an unknown style."""
    if style not in STYLES:
        raise ValueError(f"--prompt {style}: known are {', '.join(STYLES)}")
    text = without_tags(STYLES[style](item, benchmark))
    named = [int(number) - 1 for number in _NAMED_IMAGE.findall(text)]
    if benchmark.startswith("MMMU") and named and max(named) < images:
        # Images stand where the text names them, as MMMU is asked everywhere.
        return Asking(_NAMED_IMAGE.sub(IMAGE_TAG, text), tuple(named))
    return Asking(f"{IMAGE_TAG}\n" * images + text, tuple(range(images)))


def without_tags(text: str) -> str:
    """A text that mentions the tag of an image and means none."""
    return _TAG.sub("image", text)


def _vlmevalkit(item: Item, benchmark: str) -> str:
    if item.options:
        hint = f"Hint: {item.hint}\n" if item.hint else ""
        options = "".join(f"{letter}. {text}\n" for letter, text in item.options.items())
        request = "Please select the correct answer from the options above. \n"
        return f"{hint}Question: {item.question}\nOptions:\n{options}{request}"
    if benchmark.startswith("MMMU"):
        return f"Question: {item.question}\n"
    if item.answer.strip().lower() in ("yes", "no"):
        return item.question
    if benchmark.startswith("PathVQA"):
        return f"{item.question}\nPlease directly provide a short answer to the question. "
    return f"{item.question}\nAnswer the question using a single word or phrase."


def _llava(item: Item, benchmark: str) -> str:
    hint = f"{item.hint}\n" if item.hint else ""
    if not item.options:
        return f"{hint}{item.question}\nAnswer the question using a single word or phrase."
    options = "".join(f"\n{letter}. {text}" for letter, text in item.options.items())
    request = "Answer with the option's letter from the given choices directly."
    if _CHINESE.search(item.question):
        request = "请直接回答选项字母。"
    return f"{hint}{item.question}{options}\n{request}"


def _plain(item: Item, benchmark: str) -> str:
    lines = [item.question, *(f"{letter}. {text}" for letter, text in item.options.items())]
    if item.options:
        lines.append("Answer with the letter.")
    return "\n".join([item.hint, *lines] if item.hint else lines)


STYLES: dict[str, Callable[[Item, str], str]] = {
    "vlmevalkit": _vlmevalkit,
    "llava": _llava,
    "plain": _plain,
}
