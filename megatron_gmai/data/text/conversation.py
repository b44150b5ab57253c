"""GMAI-VL's annotation records, checked: who speaks, what is said, where the images stand.

A record is `{"image": name | [names] | absent, "conversations": [{"from": "human" | "gpt" |
"system", "value": text}, ...], "id", "width", "height"}`; `<image>` in a human text marks the
place of one image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_gmai.data.ledger import BadSample

IMAGE_TAG = "<image>"
OTHER_NAMES = {"image", "images", "img", "imgs", "image_path", "image_paths", "image_file", "video"}
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class Turn:
    """One message. `role` is system, user or assistant; user texts may hold image tags."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns in order: a system turn perhaps, then user and assistant in alternation."""

    turns: tuple[Turn, ...]

    @property
    def num_images(self) -> int:
        return sum(turn.text.count(IMAGE_TAG) for turn in self.turns)


def image_names(record: Mapping[str, Any]) -> list[str]:
    """The image files that a record names under `image` or `images`; [] for text. Raises BadSample
    on any other type, and if the two differ."""
    values = {key: record.get(key) for key in ("image", "images")}
    named = [_names(v, key) for key, v in values.items() if v is not None and v not in ("", [])]
    if len(named) == 2 and named[0] != named[1]:
        raise BadSample("'image' and 'images' name different files; give one of them")
    if not named:
        _check_other_names(record)
    return named[0] if named else []


def _check_other_names(record: Mapping[str, Any]) -> None:
    """Raises BadSample for an image under another name: text alone would be trained on."""
    for key, value in record.items():
        if value and key not in ("image", "images") and key.lower() in OTHER_NAMES:
            raise BadSample(f"{key!r} is not read; images stand under 'image' or 'images'")


def _names(value: Any, key: str) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise BadSample(f"{key!r} must be a file name or a list of them, found {_short(value)}")
    return names


def parse_conversation(record: Any, num_images: int, require_answer: bool = True) -> Conversation:
    """Checks a record and returns its conversation.

    `num_images` is the number of images that belong to it. With `require_answer=False` the last
    turn may be the user's, as in a prompt. Raises BadSample with the reason.
    """
    if not isinstance(record, Mapping):
        raise BadSample(f"the record must be a JSON object, found {_short(record)}")
    items = record.get("conversations")
    if not isinstance(items, list) or not items:
        raise BadSample("no conversations")
    turns = tuple(_turn(item, index) for index, item in enumerate(items))
    _check_order(turns, require_answer)
    conversation = Conversation(turns)
    if conversation.num_images != num_images:
        tags = conversation.num_images
        raise BadSample(f"{tags} {IMAGE_TAG} in the text, but {num_images} image(s)")
    return conversation


def _turn(item: Any, index: int) -> Turn:
    if not isinstance(item, Mapping):
        raise BadSample(f"turn {index} must be a JSON object, found {_short(item)}")
    speaker, text = item.get("from"), item.get("value")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise BadSample(f"turn {index} is from {_short(speaker)}; known are {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise BadSample(f"turn {index} has no text, found {_short(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSample(f"turn {index} is not valid Unicode: {error.reason}") from error
    role = ROLES[speaker]
    text = place_images_first(text) if role == "user" else text.strip()
    if not text:
        raise BadSample(f"turn {index} ({speaker}) is empty")
    if role != "user" and IMAGE_TAG in text:
        raise BadSample(f"turn {index} ({speaker}) holds {IMAGE_TAG}; images belong to human turns")
    return Turn(role, text)


def place_images_first(text: str) -> str:
    """Puts the image tags of a human turn before its text, each on a line of its own.

    Tags between words (`compare <image> with <image>`) carry meaning where they are and stay.
    """
    body = text.strip()
    count = body.count(IMAGE_TAG)
    words = body
    while words.startswith(IMAGE_TAG):
        words = words[len(IMAGE_TAG) :].lstrip()
    while words.endswith(IMAGE_TAG):
        words = words[: -len(IMAGE_TAG)].rstrip()
    if IMAGE_TAG in words:
        return body
    return f"{IMAGE_TAG}\n" * count + words


def _check_order(turns: Sequence[Turn], require_answer: bool) -> None:
    spoken = turns[1:] if turns[0].role == "system" else turns
    for index, turn in enumerate(spoken):
        expected = "assistant" if index % 2 else "user"
        if turn.role != expected:
            index += len(turns) - len(spoken)
            raise BadSample(f"turn {index} is from the {turn.role}, expected the {expected}")
    if not spoken:
        raise BadSample("no human turn")
    if require_answer and len(spoken) % 2:
        raise BadSample("the last human turn has no answer")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
