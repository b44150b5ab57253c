"""Clients of the server that send or take nothing for long."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
from PIL import Image

from megatron_gmai.evaluate.server import app, bodies, connections
from tests.evaluate.serving import Reader, serving
from tests.evaluate.tables import encoded
from tests.evaluate.test_server import raw, user


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Unfinished:
    """Sends a part of a body and waits."""

    def __init__(self, address: str, sent: int) -> None:
        place = urlsplit(address)
        self.socket = socket.create_connection((place.hostname, place.port), timeout=20)
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n"
        )
        self.socket.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
        self.socket.sendall(b" " * sent)

    def status(self) -> int:
        return int(self.socket.recv(4096).split()[1])


def test_unfinished_bodies_share_a_bound(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bodies, "MAX_HELD_BYTES", 1_000_000)
    body = json.dumps({"messages": user("x")}).encode()
    of_server = bodies.Bodies()
    monkeypatch.setattr(app, "Bodies", lambda: of_server)
    with serving(Reader()) as address:
        first = Unfinished(address, 900_000)
        until(lambda: of_server.held == 900_000)
        assert Unfinished(address, 200_000).status() == 503
        assert raw(address, body)[0] == 200  # what was refused is held no more
        first.socket.close()
        until(lambda: of_server.held == 0)
        for _ in range(20):
            assert raw(address, body + b" " * 900_000)[0] == 200
    assert "Traceback" not in capfd.readouterr().err  # clients that leave fill no log


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_SECONDS", 0.3)
    with serving(Reader()) as address:
        slow = Unfinished(address, 1000)
        assert slow.status() == 408
        with contextlib.suppress(ConnectionResetError):
            while slow.socket.recv(4096):  # up to the end of the connection
                pass


def test_a_connection_without_a_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_IDLE_SECONDS", 0.3)
    with serving(Reader(seconds_a_step=0.3)) as address:
        place = urlsplit(address)
        silent, half = (socket.create_connection((place.hostname, place.port)) for _ in range(2))
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: local")
        said = raw(address, json.dumps({"messages": user("one two three")}).encode())
        assert said[0] == 200  # which took longer
        for connection in (silent, half):
            connection.settimeout(60)
            assert connection.recv(100) == b""


def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "MAX_STALLED_SECONDS", 0.3)
    lost, lose = threading.Event(), connections.Connection.connection_lost

    def tell(connection: connections.Connection, error: Exception | None) -> None:
        lose(connection, error)
        lost.set()

    monkeypatch.setattr(connections.Connection, "connection_lost", tell)
    picture = encoded(Image.effect_noise((2000, 2000), 90))
    with serving(Reader()) as address:
        place = urlsplit(address)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        connection.connect()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        kind = {"Content-Type": "application/octet-stream"}
        connection.request("POST", "/preview", picture, kind)
        answer = connection.getresponse()
        assert lost.wait(60)
        with pytest.raises(http.client.IncompleteRead):
            answer.read()
