"""The server's generator over a model, or over this rank's part of one."""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_gmai.chat_formats import chat_format
from megatron_gmai.config import Config
from megatron_gmai.data.images.resize import to_square
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.text.template import Rendered, render
from megatron_gmai.data.text.tokenizer import Tokenizer
from megatron_gmai.evaluate.generate import Decoding, Prompt
from megatron_gmai.evaluate.server.generator import Piece, Request
from megatron_gmai.model.gmai_vl import GMAIVL


class ModelGenerator:
    """Answers with a model; ranks that share one make the same calls (`sharded.py`)."""

    def __init__(self, name: str, model: GMAIVL, config: Config, tokenizer: Tokenizer) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.decoding = Decoding(model)
        self.answers: list[_Answer] = []  # under way
        self.template = chat_format(config.data.chat_template)
        self.stop_id = tokenizer.special_id(self.template.end_of_answer)
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

    def admit(self, requests: Sequence[Request]) -> list[Piece]:
        chosen = self.decoding.admit(
            [self._prompt(request) for request in requests],
            [request.max_tokens for request in requests],
            [request.sampling for request in requests],
        )
        new = [_Answer(self.tokenizer, self.stop_id, request.max_tokens) for request in requests]
        self.answers += new
        return [answer.add(token) for answer, token in zip(new, chosen, strict=True)]

    def advance(self) -> list[Piece]:
        chosen = self.decoding.advance()
        return [answer.add(token) for answer, token in zip(self.answers, chosen, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        self.decoding.keep(rows)
        self.answers = [self.answers[row] for row in rows]

    def _render(self, request: Request) -> Rendered:
        return render(
            request.conversation, self.template, self.tokenizer, self.vision.tokens_per_image
        )

    def _prompt(self, request: Request) -> Prompt:
        rendered = self._render(request)
        side = self.vision.image_size
        pixels = torch.empty(len(request.images), 3, side, side, dtype=torch.uint8)
        for position, image in enumerate(request.images):
            pixels[position] = torch.from_numpy(image)
        return Prompt(
            torch.from_numpy(rendered.tokens), torch.from_numpy(rendered.image_starts), pixels
        )


class _Answer:
    """The tokens of one answer, and how much of their text has been sent."""

    def __init__(self, tokenizer: Tokenizer, stop_id: int, most: int) -> None:
        self.tokenizer, self.stop_id, self.most = tokenizer, stop_id, most
        self.tokens: list[int] = []
        self.sent = 0

    def add(self, token: int) -> Piece:
        stopped = token == self.stop_id
        if not stopped:
            self.tokens.append(token)
        finish = "stop" if stopped else "length" if len(self.tokens) == self.most else None
        text = self.tokenizer.decode(self.tokens).lstrip()
        # A character of several tokens is not whole before its last one.
        ready = text if finish else text.rstrip("\ufffd")
        new, self.sent = ready[self.sent :], max(self.sent, len(ready))
        return Piece(new, int(not stopped), finish)
