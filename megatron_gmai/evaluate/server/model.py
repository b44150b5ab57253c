"""The server's generator over a model in this process."""

from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from megatron_gmai.chat_formats import chat_format
from megatron_gmai.config import Config
from megatron_gmai.data.images.resize import to_square
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.text.template import Rendered, render
from megatron_gmai.data.text.tokenizer import Tokenizer
from megatron_gmai.evaluate.generate import Prompt, generate_steps
from megatron_gmai.evaluate.server.generator import Piece, Request
from megatron_gmai.model.gmai_vl import GMAIVL


class ModelGenerator:
    """Answers batches with a model that holds every layer."""

    def __init__(self, name: str, model: GMAIVL, config: Config, tokenizer: Tokenizer) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.template = chat_format(config.data.chat_template)
        self.vision, self.pad_to_square = config.model.vision, config.data.pad_to_square
        self.positions = config.model.language.max_position_embeddings

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [3, side, side], as in training."""
        return to_square(pixels, self.vision.image_size, self.pad_to_square)

    def prompt_tokens(self, request: Request) -> int:
        length = len(self._render(request).tokens)
        if length + request.max_tokens > self.positions:
            raise BadSample(
                f"the prompt has {length} tokens and the answer may have {request.max_tokens}; "
                f"together the model has room for {self.positions}"
            )
        return length

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Piece]]:
        answers = [_Answer(self.tokenizer, request.max_tokens) for request in requests]
        stop_id = self.tokenizer.special_id(self.template.end_of_answer)
        sampler = Sampler(requests)
        most = max(request.max_tokens for request in requests)
        prompts = [self._prompt(request) for request in requests]
        steps = generate_steps(self.model, prompts, self.tokenizer.pad_id, most, sampler)
        with closing(steps):  # type: ignore[type-var]
            for step, chosen in enumerate(steps):
                last = step + 1 == most
                pieces = [
                    answer.add(place, token, token == stop_id, last)
                    for place, (answer, token) in enumerate(
                        zip(answers, chosen.tolist(), strict=True)
                    )
                    if not answer.finished
                ]
                yield pieces
                if all(answer.finished for answer in answers):
                    return

    def _render(self, request: Request) -> Rendered:
        return render(
            request.conversation, self.template, self.tokenizer, self.vision.tokens_per_image
        )

    def _prompt(self, request: Request) -> Prompt:
        rendered = self._render(request)
        side = self.vision.image_size
        pixels = torch.empty(len(request.images), 3, side, side, dtype=torch.uint8)
        for place, image in enumerate(request.images):
            pixels[place] = torch.from_numpy(image)
        return Prompt(
            torch.from_numpy(rendered.tokens), torch.from_numpy(rendered.image_starts), pixels
        )


# Below it nothing but the most probable token is drawn, and in float32 the division would overflow.
LEAST_TEMPERATURE = 1e-4


class _Answer:
    """The tokens of one answer, and how much of their text has been sent."""

    def __init__(self, tokenizer: Tokenizer, most: int) -> None:
        self.tokenizer, self.most = tokenizer, most
        self.tokens: list[int] = []
        self.sent = 0
        self.finished = False

    def add(self, place: int, token: int, stopped: bool, last: bool) -> Piece:
        if not stopped:
            self.tokens.append(token)
        cut = last or len(self.tokens) == self.most
        self.finished = stopped or cut
        text = self.tokenizer.decode(self.tokens).lstrip()
        # A character of several tokens is not whole before its last one.
        ready = text if self.finished else text.rstrip("\ufffd")
        new, self.sent = ready[self.sent :], max(self.sent, len(ready))
        finish = "stop" if stopped else "length" if cut else None
        return Piece(place, new, int(not stopped), finish)


class Sampler:
    """Chooses tokens by each request's temperature and nucleus (Holtzman et al. 2020)."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.random = [torch.Generator() for _ in requests]
        for generator, request in zip(self.random, requests, strict=True):
            if request.seed is None:
                generator.seed()
            else:
                generator.manual_seed(request.seed % 2**63)

    def __call__(self, logits: Tensor) -> Tensor:
        chosen = logits.argmax(dim=-1)
        for place, request in enumerate(self.requests):
            if request.temperature >= LEAST_TEMPERATURE:
                chosen[place] = self._draw(logits[place].float().cpu(), place)
        return chosen

    def _draw(self, logits: Tensor, place: int) -> int:
        request = self.requests[place]
        # The greatest is 0 before it is divided, so that no quotient is infinite upwards.
        scaled = (logits - logits.max()) / request.temperature
        probabilities, order = scaled.softmax(-1).sort(descending=True)
        # The most probable token always stays: what stands before it sums to nothing.
        outside = probabilities.cumsum(-1) - probabilities >= max(request.top_p, 1e-6)
        kept = probabilities.masked_fill(outside, 0.0)
        drawn = torch.multinomial(kept, 1, generator=self.random[place])
        return int(order[drawn])
