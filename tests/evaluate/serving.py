"""A server in a thread, over a generator whose answers are known."""

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import uvicorn

from megatron_gmai.data.ledger import BadSample
from megatron_gmai.evaluate.server.app import Settings, build_app
from megatron_gmai.evaluate.server.generator import Generator, Piece, Request


class Reader:
    """Answers with what it was asked, word by word: the last text, the turns and the images."""

    name = "reader"

    def __init__(self, seconds_a_step: float = 0.0) -> None:
        self.seconds_a_step = seconds_a_step
        self.batches: list[int] = []
        self.steps = 0

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.mean(axis=(0, 1)).astype(np.uint8)

    def prompt_tokens(self, request: Request) -> int:
        words = sum(len(turn.text.split()) for turn in request.conversation.turns)
        if words > 1000:
            raise BadSample("the prompt is too long")
        return words

    def words(self, request: Request) -> list[str]:
        turns = request.conversation.turns
        if "fail" in turns[-1].text:
            raise RuntimeError("a planted failure")
        images = ",".join(str(int(image[0])) for image in request.images)
        if "forever" in turns[-1].text:
            return ["again"] * 100_000
        return [*turns[-1].text.split(), f"turns={len(turns)}", f"images={images}"]

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Piece]]:
        self.batches.append(len(requests))
        left = {place: self.words(request) for place, request in enumerate(requests)}
        said = dict.fromkeys(left, 0)
        while left:
            time.sleep(self.seconds_a_step)
            self.steps += 1
            pieces = []
            for place in list(left):
                words, count = left[place], said[place]
                last, cut = count + 1 == len(words), count + 1 == requests[place].max_tokens
                finish = "stop" if last else "length" if cut else None
                text = words[count] + ("" if finish else " ")
                pieces.append(Piece(place, text, finish=finish))
                said[place] += 1
                if finish:
                    del left[place]
            yield pieces


@contextmanager
def serving(generator: Generator, settings: Settings | None = None) -> Iterator[str]:
    """The address of a server that runs until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = build_app(generator, settings or Settings())
    config = uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=20)
    assert not thread.is_alive()
