"""The server's generator over a real model: what whole passes say, streamed and in batches."""

import base64
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import openai
import pytest
import torch

from megatron_gmai.config import Config
from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.text.conversation import parse_conversation
from megatron_gmai.data.text.tokenizer import Tokenizer
from megatron_gmai.evaluate.generate import generate
from megatron_gmai.evaluate.server.generator import Request
from megatron_gmai.evaluate.server.model import ModelGenerator, Sampler
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
    return Request(conversation, images, most, temperature, seed=5)


def answers(generator: ModelGenerator, requests: Sequence[Request]) -> list[tuple[str, str, int]]:
    """Text, finish and tokens of each, put together from the pieces."""
    told = [("", "", 0) for _ in requests]
    for pieces in generator.generate(requests):
        for piece in pieces:
            text, finish, tokens = told[piece.place]
            assert not finish, "nothing comes behind the last piece"
            told[piece.place] = (text + piece.text, piece.finish or "", tokens + piece.tokens)
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
    stop = generator.tokenizer.special_id(generator.template.end_of_answer)
    prompt = generator._prompt(one)
    (ids,) = generate(generator.model, [prompt], stop, generator.tokenizer.pad_id, NEW)
    (told,) = answers(generator, [one])
    assert told[0].strip() == generator.tokenizer.decode(ids).strip()
    assert told[1:] == ("stop" if len(ids) < NEW else "length", len(ids))


def test_a_prompt_that_leaves_no_room_is_refused(generator: ModelGenerator) -> None:
    one = request(generator, "what is shown here " * 3)
    assert generator.prompt_tokens(one) == len(generator._prompt(one).tokens)
    with pytest.raises(BadSample, match="room for 512"):
        generator.prompt_tokens(request(generator, "what is shown here " * 3, most=510))


class TestSampler:
    LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])

    def drawn(self, generator: ModelGenerator, temperature: float, top_p: float) -> np.ndarray:
        one = request(generator, "scan", temperature=temperature)
        sampler = Sampler([Request(one.conversation, (), 1, temperature, top_p, seed=1)])
        return np.bincount([int(sampler(self.LOGITS)) for _ in range(2000)], minlength=4) / 2000

    def test_it_draws_by_probability(self, generator: ModelGenerator) -> None:
        expected = (self.LOGITS[0] / 0.7).softmax(-1).numpy()
        assert self.drawn(generator, 0.7, 1.0) == pytest.approx(expected, abs=0.04)

    def test_a_nucleus_keeps_the_fewest_that_reach_it(self, generator: ModelGenerator) -> None:
        kept = (self.drawn(generator, 1.0, 0.8) > 0).tolist()
        assert kept == [True, True, False, False]
        assert self.drawn(generator, 1.0, 0.0).tolist() == [1, 0, 0, 0]

    def test_no_temperature_means_the_most_probable(self, generator: ModelGenerator) -> None:
        assert self.drawn(generator, 0.0, 1.0).tolist() == [1, 0, 0, 0]

    @pytest.mark.parametrize("temperature", [1e-4, 1e-38, 1e-40, 5e-324])
    def test_next_to_none_does_not_fail_the_batch(
        self, generator: ModelGenerator, temperature: float
    ) -> None:
        one = request(generator, "scan", temperature=1.0)
        tiny = Request(one.conversation, (), 1, temperature, 1.0, seed=1)
        sampler = Sampler([tiny, Request(one.conversation, (), 1, 1.0, 1.0, seed=1)])
        logits = torch.cat([self.LOGITS * 1e37, self.LOGITS])
        assert int(sampler(logits)[0]) == 0

    def test_a_seed_repeats_an_answer(self, generator: ModelGenerator) -> None:
        hot = request(generator, "is a lung shown", 1, temperature=2.0)
        assert answers(generator, [hot]) == answers(generator, [hot])
        assert answers(generator, [hot]) != answers(generator, [mixed(generator)[0]])


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
