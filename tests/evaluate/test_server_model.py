"""The server's generator over a real model: what whole passes say, streamed and in batches."""

import base64
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest

from megatron_gmai.config import Config
from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.text.conversation import parse_conversation
from megatron_gmai.data.text.tokenizer import Tokenizer
from megatron_gmai.evaluate.generate import generate
from megatron_gmai.evaluate.sampling import Sampling
from megatron_gmai.evaluate.server.generator import Piece, Request
from megatron_gmai.evaluate.server.model import ModelGenerator
from tests.evaluate.models import build, config_for
from tests.evaluate.serving import serving
from tests.evaluate.tables import png
from tests.parallel.cases import Processes

NEW = 12


@pytest.fixture
def generator(alone: Processes, tokenizer: Tokenizer) -> ModelGenerator:
    config: Config = config_for(tokenizer)
    return ModelGenerator("tiny", build(alone, config), config, tokenizer)


def request(
    generator: ModelGenerator, text: str, *seeds: int, most: int = NEW, temperature: float = 0.0
) -> Request:
    value = "<image>\n" * len(seeds) + text
    record = {"conversations": [{"from": "human", "value": value}]}
    conversation = parse_conversation(record, len(seeds), require_answer=False)
    images = tuple(generator.prepare(decode(png(seed))) for seed in seeds)
    return Request(conversation, images, most, Sampling(temperature, seed=5))


def answers(generator: ModelGenerator, requests: Sequence[Request]) -> list[tuple[str, str, int]]:
    """Text, finish and tokens of each, put together from the pieces."""
    told = [("", "", 0) for _ in requests]
    rows = list(range(len(requests)))
    pieces = generator.admit(requests)
    while rows:
        for row, piece in zip(rows, pieces, strict=True):
            text, _, tokens = told[row]
            told[row] = (text + piece.text, piece.finish or "", tokens + piece.tokens)
        generator.keep([place for place, piece in enumerate(pieces) if not piece.finish])
        rows = [row for row, piece in zip(rows, pieces, strict=True) if not piece.finish]
        pieces = generator.advance() if rows else []
    return told


def mixed(generator: ModelGenerator) -> list[Request]:
    return [
        request(generator, "is a lung shown", 1),
        request(generator, "what is shown here " * 6, most=5),
        request(generator, "left right", 2, 3),
        request(generator, "scan", 4, most=1),
    ]


def test_a_batch_says_what_each_request_alone_does(generator: ModelGenerator) -> None:
    requests = mixed(generator)
    together = answers(generator, requests)
    assert together == [answers(generator, [one])[0] for one in requests]
    assert [tokens for _, _, tokens in together][1] <= 5 and together[3][2] <= 1
    assert len({text for text, _, _ in together}) == 4


def test_the_pieces_join_to_the_text_that_prediction_gives(generator: ModelGenerator) -> None:
    one = mixed(generator)[0]
    stop = generator.stop_id
    prompt = generator._prompt(one)
    (ids,) = generate(generator.model, [prompt], stop, NEW)
    (told,) = answers(generator, [one])
    assert told[0].strip() == generator.tokenizer.decode(ids).strip()
    assert told[1:] == ("stop" if len(ids) < NEW else "length", len(ids))


def test_a_prompt_that_leaves_no_room_is_refused(generator: ModelGenerator) -> None:
    one = request(generator, "what is shown here " * 3)
    assert generator.prompt_tokens(one) == len(generator._prompt(one).tokens)
    with pytest.raises(BadSample, match="room for 512"):
        generator.prompt_tokens(request(generator, "what is shown here " * 3, most=510))


def test_requests_may_join_and_leave_under_way(generator: ModelGenerator) -> None:
    """Each answer is what it is alone, whoever comes or goes beside it."""
    first, second, third = (request(generator, text, 1) for text in ("is a lung", "scan", "left"))
    alone = [answers(generator, [one])[0][0] for one in (first, second, third)]
    texts = ["", "", ""]

    def heard(*rows: int, pieces: Sequence[Piece]) -> None:
        assert not any(piece.finish for piece in pieces)
        for row, piece in zip(rows, pieces, strict=True):
            texts[row] += piece.text

    heard(0, pieces=generator.admit([first]))
    heard(0, pieces=generator.advance())
    heard(1, pieces=generator.admit([second]))
    heard(0, 1, pieces=generator.advance())
    generator.keep([1])
    heard(1, pieces=generator.advance())
    heard(2, pieces=generator.admit([third]))
    heard(1, 2, pieces=generator.advance())
    generator.keep([])
    assert all(texts) and [whole.startswith(text) for whole, text in zip(alone, texts, strict=True)]


@pytest.fixture
def address(generator: ModelGenerator) -> Iterator[str]:
    with serving(generator) as address:
        yield address


def test_the_openai_client_gets_the_models_answer(generator: ModelGenerator, address: str) -> None:
    one = mixed(generator)[0]
    (expected,) = answers(generator, [one])
    url = f"data:image/png;base64,{base64.b64encode(png(1)).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "is a lung shown"},
    ]
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    ask: Any = client.chat.completions.create
    messages = [{"role": "user", "content": content}]
    whole = ask(model="tiny", messages=messages, max_tokens=NEW)
    streamed = ask(model="tiny", messages=messages, max_tokens=NEW, stream=True)
    texts = [chunk.choices[0].delta.content or "" for chunk in streamed]
    assert whole.choices[0].message.content == "".join(texts) == expected[0]
    assert whole.usage.completion_tokens == expected[2]
