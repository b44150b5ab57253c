"""Chat-completion requests in OpenAI's shape, checked: sizes, roles, images, settings.

Images come as data URLs alone: fetching addresses that strangers name would let them reach into the
server's network.
"""

import binascii
import secrets
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.text.conversation import IMAGE_TAG, parse_conversation
from megatron_gmai.evaluate.prompts import without_tags
from megatron_gmai.evaluate.sampling import Sampling
from megatron_gmai.evaluate.server.generator import Generator, Request

MAX_BODY_BYTES = 64 * 1024**2
MAX_VALUES = 1_000_000  # in a body; commas in texts count too
MAX_MESSAGES = 200
MAX_IMAGES = 16
MAX_TEXT = 200_000
DEFAULT_TOKENS = 256
# What would change the answer and is not done here.
_NOT_DONE = (
    *("tools", "functions", "stop", "logprobs", "response_format", "audio", "logit_bias"),
    *("frequency_penalty", "presence_penalty"),
)
_CHANGES_NOTHING = {"type": "text"}  # as a response_format


class BadRequest(ValueError):
    """A request that cannot be answered; `status` is HTTP's."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


@dataclass(frozen=True)
class Chat:
    """A parsed request."""

    request: Request
    stream: bool
    include_usage: bool


def parse_chat(body: Any, generator: Generator, most_tokens: int) -> Chat:
    """Raises BadRequest with what is wrong and where."""
    if not isinstance(body, Mapping):
        raise BadRequest("the body must be a JSON object")
    if body.get("model") not in (None, generator.name):
        raise BadRequest(f"the model here is {generator.name}", "model", 404)
    for name in _NOT_DONE:
        if body.get(name) and body[name] != _CHANGES_NOTHING:
            raise BadRequest(f"{name} is not supported", name)
    if _number(body, "n", 1, 1, 1) != 1:
        raise BadRequest("only one answer is given", "n")
    record, images = _conversation(body.get("messages"), generator)
    try:
        conversation = parse_conversation(record, len(images), require_answer=False)
    except BadSample as error:
        raise BadRequest(str(error), "messages") from error
    if conversation.turns[-1].role != "user":
        raise BadRequest("the last message must be the user's", "messages")
    options = body.get("stream_options")
    return Chat(
        Request(
            conversation=conversation,
            images=tuple(images),
            max_tokens=_most_tokens(body, most_tokens),
            sampling=_sampling(body),
        ),
        stream=body.get("stream") is True,
        include_usage=isinstance(options, Mapping) and options.get("include_usage") is True,
    )


def _sampling(body: Mapping[str, Any]) -> Sampling:
    seed = body.get("seed")
    if isinstance(seed, bool) or not isinstance(seed, int | None):
        raise BadRequest("seed must be a whole number", "seed")
    return Sampling(
        temperature=_number(body, "temperature", 0.0, 0, 2),
        top_p=_number(body, "top_p", 1.0, 0, 1),
        seed=secrets.randbits(63) if seed is None else seed,
    )


def _most_tokens(body: Mapping[str, Any], most: int) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            return min(int(_number(body, name, DEFAULT_TOKENS, 1, 1_000_000)), most)
    return min(DEFAULT_TOKENS, most)


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadRequest(f"{name} must be a number from {low:g} to {high:g}", name)
    return value


def _conversation(messages: Any, generator: Generator) -> tuple[dict[str, Any], list[np.ndarray]]:
    """GMAI-VL's record of the messages, and their images."""
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with one or more", "messages")
    if len(messages) > MAX_MESSAGES:
        raise BadRequest(f"more than {MAX_MESSAGES} messages", "messages")
    turns: list[dict[str, Any]] = []
    images: list[np.ndarray] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise BadRequest(f"{where} must be an object", where)
        text = _content(message.get("content"), images, generator, where)
        turns.append({"from": message.get("role"), "value": text})
    if sum(len(turn["value"]) for turn in turns) > MAX_TEXT:
        raise BadRequest(f"more than {MAX_TEXT} characters", "messages")
    return {"conversations": turns}, images


def _content(content: Any, images: list[np.ndarray], generator: Generator, where: str) -> str:
    """The text of a message, with tags for the images that are appended to `images`."""
    if isinstance(content, str):
        return without_tags(content)
    if not isinstance(content, list):
        raise BadRequest(f"{where}.content must be a text or a list of parts", where)
    texts = [""]  # before, between and behind the images
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts[-1] += part["text"]
        elif kind == "image_url":
            if len(images) == MAX_IMAGES:
                raise BadRequest(f"more than {MAX_IMAGES} images", where)
            images.append(generator.prepare(_image(part.get("image_url"), where)))
            texts.append("")
        else:
            raise BadRequest(f"{where}: parts are of type text or image_url", where)
    return f"{IMAGE_TAG}\n".join(map(without_tags, texts))


def _image(value: Any, where: str) -> np.ndarray:
    address = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(address, str) or not address.startswith("data:"):
        raise BadRequest(f"{where}: images must be data URLs (data:image/png;base64,...)", where)
    head, _, encoded = address.partition(",")
    if not head.endswith(";base64"):
        raise BadRequest(f"{where}: the data URL must be in base64", where)
    try:
        return decode(b64decode(encoded, validate=True))
    except (BadSample, binascii.Error, ValueError) as error:
        raise BadRequest(f"{where}: {error}", where) from error
