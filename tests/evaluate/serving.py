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
from megatron_gmai.evaluate.server.connections import Connection
from megatron_gmai.evaluate.server.generator import Generator, Piece, Request


class Reader:
    """Answers with what it was asked, word by word: the last text, the turns and the images."""

    name = "reader"

    def __init__(self, seconds_a_step: float = 0.0) -> None:
        self.seconds_a_step = seconds_a_step
        self.batches: list[int] = []  # answers under way at each step
        self.left: list[tuple[list[str], int]] = []  # words to say, and the most that are

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.mean(axis=(0, 1)).astype(np.uint8)

    def prompt_tokens(self, request: Request) -> int:
        words = sum(len(turn.text.split()) for turn in request.conversation.turns)
        if words > 1000:
            raise BadSample("the prompt is too long")
        return words

    def words(self, request: Request) -> list[str]:
        turns = request.conversation.turns
        if turns[-1].text == "fail":
            raise RuntimeError("a planted failure")
        images = ",".join(str(int(image[0])) for image in request.images)
        if "forever" in turns[-1].text:
            return ["again"] * 100_000
        return [*turns[-1].text.split(), f"turns={len(turns)}", f"images={images}"]

    def admit(self, requests: Sequence[Request]) -> list[Piece]:
        new = [(self.words(request), request.max_tokens) for request in requests]
        self.left += new
        return self.say(len(self.left) - len(new))

    def advance(self) -> list[Piece]:
        return self.say(0)

    def say(self, first: int) -> list[Piece]:
        """A word of each answer from row `first` on."""
        time.sleep(self.seconds_a_step)
        self.batches.append(len(self.left) - first)
        pieces = []
        for row in range(first, len(self.left)):
            (word, *rest), most = self.left[row]
            if word == "fail-later":
                raise RuntimeError("a planted failure")
            finish = "length" if rest and most == 1 else None if rest else "stop"
            pieces.append(Piece(word + ("" if finish else " "), finish=finish))
            self.left[row] = rest, most - 1
        return pieces

    def keep(self, rows: Sequence[int]) -> None:
        self.left = [self.left[row] for row in rows]


@contextmanager
def serving(generator: Generator, settings: Settings | None = None) -> Iterator[str]:
    """The address of a server that runs until the block ends."""
    bound = socket.create_server(("127.0.0.1", 0))
    app = build_app(generator, settings or Settings())
    config = uvicorn.Config(app, http=Connection, log_level="error", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=20)
    assert not thread.is_alive()
