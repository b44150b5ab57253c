"""A judge model at an OpenAI-shaped address: this project's server, and ones that talk nonsense."""

import socket
import threading
from collections.abc import Iterator

import pytest

from megatron_gmai.evaluate.judge import openai_ask
from tests.evaluate.serving import Reader, serving

DEEP = b"HTTP/1.0 200\r\n\r\n" + b"[" * 100_000


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(Reader()) as address:
        yield address


def test_this_projects_server_is_asked(address: str) -> None:
    ask = openai_ask(f"{address}/v1/", "reader", key=None)
    assert ask("is it the same") == "is it the same turns=1 images="


def test_failures_are_told(address: str) -> None:
    with pytest.raises(ValueError, match="gave no answer: HTTP Error 404"):
        openai_ask(f"{address}/v1", "another", key="k")("x")
    with pytest.raises(ValueError, match="gave no answer"):
        openai_ask("http://127.0.0.1:9/v1", "reader", key=None)("x")


@pytest.mark.parametrize("reply", [b"no HTTP\r\n\r\n", DEEP])
def test_one_that_answers_nonsense_is_told(reply: bytes) -> None:
    def answer(server: socket.socket) -> None:
        with server.accept()[0] as connection:
            connection.recv(100_000)
            connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=[server])
        thread.start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        with pytest.raises(ValueError, match="gave no answer"):
            openai_ask(address, "reader", key=None)("x")
        thread.join()
