"""The server, asked by the `openai` client and by clients that mean no good."""

import base64
import http.client
import json
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import openai
import psutil
import pytest
from PIL import Image

from megatron_gmai.data.text.conversation import Conversation, Turn
from megatron_gmai.evaluate.server.app import Settings
from megatron_gmai.evaluate.server.batching import Batcher, Job
from megatron_gmai.evaluate.server.generator import Piece, Request
from megatron_gmai.evaluate.server.parsing import MAX_BODY_BYTES
from tests.evaluate.serving import Reader, serving
from tests.evaluate.tables import encoded


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(Reader()) as address:
        yield address


def client(address: str, key: str = "none") -> Any:
    """The real client; its types ask for more than these tests say."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


def grey(level: int, kind: str = "PNG") -> dict[str, Any]:
    data = encoded(Image.new("RGB", (20, 10), (level,) * 3), kind)
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: Any) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return [{"role": "user", "content": content}]


def raw(
    address: str, body: bytes, path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a request as it stands."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    sent = {"Content-Type": "application/json"} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    try:
        connection.request("POST", path, body, sent)
        answer = connection.getresponse()
        data = answer.read()
    finally:
        connection.close()
    try:
        return answer.status, json.loads(data)
    except ValueError:
        return answer.status, {}


class TestTheOpenAIClient:
    def test_an_answer(self, address: str) -> None:
        answer = client(address).chat.completions.create(
            model="reader", messages=user("what is it", grey(7), grey(99)), temperature=0
        )
        choice = answer.choices[0]
        assert choice.message.content == "<image> <image> what is it turns=1 images=7,99"
        assert (choice.finish_reason, answer.usage.completion_tokens) == ("stop", 7)

    def test_what_changes_nothing_is_no_mistake(self, address: str) -> None:
        answer = client(address).chat.completions.create(
            model="reader",
            messages=user("what <<image>>", " is <ima", "ge> there"),
            response_format={"type": "text"},
            frequency_penalty=0,
            stop=[],
        )
        said = answer.choices[0].message.content
        assert said == "what image is image there turns=1 images="

    def test_images_first_stand_first(self, address: str) -> None:
        messages = user(grey(7, "JPEG"), "what is it")
        answer = client(address).chat.completions.create(model="reader", messages=messages)
        assert answer.choices[0].message.content == "<image> what is it turns=1 images=7"

    def test_a_stream_says_the_same(self, address: str) -> None:
        stream = client(address).chat.completions.create(
            model="reader",
            messages=user(grey(7), "what is it"),
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(texts) == "<image> what is it turns=1 images=7" and len(texts) > 4
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage.completion_tokens == 6

    def test_follow_up_questions(self, address: str) -> None:
        messages = [
            {"role": "system", "content": "be brief"},
            *user(grey(3), "first"),
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "second"},
        ]
        answer = client(address).chat.completions.create(model="reader", messages=messages)
        assert answer.choices[0].message.content == "second turns=4 images=3"

    def test_an_answer_that_is_cut_says_so(self, address: str) -> None:
        answer = client(address).chat.completions.create(
            model="reader", messages=user("one two three"), max_tokens=2
        )
        assert answer.choices[0].message.content == "one two"
        assert answer.choices[0].finish_reason == "length"

    def test_models_and_health(self, address: str) -> None:
        assert [model.id for model in client(address).models.list()] == ["reader"]

    def test_errors_are_the_clients_own(self, address: str) -> None:
        with pytest.raises(openai.NotFoundError, match="the model here is reader"):
            client(address).chat.completions.create(model="other", messages=user("x"))
        with pytest.raises(openai.BadRequestError, match="data URLs"):
            part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
            client(address).chat.completions.create(model="reader", messages=user(part))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "JSON object"),
        (b"{}", "messages must be a list"),
        (b'{"messages": []}', "messages must be a list"),
        (b'{"messages": ["x"]}', "must be an object"),
        (b'{"messages": [{"role": "user", "content": 1}]}', "a text or a list"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "known are"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "expected the user"),
        (b'{"messages": [{"role": "user", "content": ""}]}', "is empty"),
        (b'{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}', "text or image_url"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}', "a number"),
        (b'{"messages": [{"role": "user", "content": "x"}], "top_p": NaN}', "a number"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', "a number"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 2}', "n must be"),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": "7"}', "whole number"),
        (b'{"messages": [{"role": "user", "content": "x"}], "presence_penalty": 1}', "supported"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', "not supported"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "Unicode"),
    ],
)
def test_malformed_requests_get_a_reason(address: str, body: bytes, said: str) -> None:
    status, answer = raw(address, body)
    assert status == 400 and said in answer["error"]["message"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:image/png;base64,AAAA", "not an image"),
        ("data:image/png;base64,!!!!", ""),
        ("data:image/png,plain", "must be in base64"),
        ("file:///etc/passwd", "must be data URLs"),
        (None, "must be data URLs"),
    ],
)
def test_images_that_are_none_are_refused(address: str, url: str | None, said: str) -> None:
    body = {"messages": user({"type": "image_url", "image_url": {"url": url}})}
    status, answer = raw(address, json.dumps(body).encode())
    assert status == 400 and said in answer["error"]["message"]


def test_a_small_file_of_a_giant_image_is_refused_undecoded(address: str) -> None:
    data = encoded(Image.new("1", (20_000, 20_000)))
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    body = {"messages": user({"type": "image_url", "image_url": {"url": url}}, "x")}
    begun = time.monotonic()
    status, answer = raw(address, json.dumps(body).encode())
    assert status == 400 and "exceeds" in answer["error"]["message"]
    assert time.monotonic() - begun < 10


def test_a_body_beyond_the_bound_is_not_read_to_its_end(address: str) -> None:
    status, answer = raw(address, b" " * (MAX_BODY_BYTES + 1))
    assert status == 413 and "larger than" in answer["error"]["message"]


def test_a_body_of_values_without_number_is_not_parsed(address: str) -> None:
    status, answer = raw(address, b'{"messages": [' + b"[]," * 600_000 + b"[]]}")
    assert status == 413 and "values" in answer["error"]["message"]


def test_too_many_images_are_refused(address: str) -> None:
    body = {"messages": user(*[grey(1)] * 17, "x")}
    status, answer = raw(address, json.dumps(body).encode())
    assert status == 400 and "more than 16 images" in answer["error"]["message"]


class TestStrangers:
    """Pages of other sites in the user's browser, and people without the key."""

    BODY = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()

    def test_a_form_of_another_site_is_refused(self, address: str) -> None:
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            assert raw(address, self.BODY, Content_Type=kind)[0] == 415
        assert raw(address, self.BODY, Content_Type="Application/JSON")[0] == 200
        assert raw(address, b"x", "/preview", Content_Type="text/plain")[0] == 415

    def test_another_name_for_this_machine_is_refused(self, address: str) -> None:
        assert raw(address, self.BODY, Host="evil.example")[0] == 400
        assert raw(address, self.BODY, Host="localhost:1")[0] == 200

    def test_a_key_is_needed_where_one_is_set(self) -> None:
        with serving(Reader(), Settings(api_key="s3cret")) as address:
            with pytest.raises(openai.AuthenticationError):
                client(address, "wrong").models.list()
            assert raw(address, self.BODY)[0] == 401
            assert raw(address, b"x", "/preview", Content_Type="application/octet-stream")[0] == 401
            answer = client(address, "s3cret").chat.completions.create(
                model="reader", messages=user("x")
            )
            assert answer.choices[0].message.content == "x turns=1 images="


class TestUnderLoad:
    def ask(self, address: str, text: str) -> str:
        answer = client(address).chat.completions.create(model="reader", messages=user(text))
        return answer.choices[0].message.content or ""

    def test_500_requests_20_at_a_time_are_answered_in_batches_and_memory_is_flat(self) -> None:
        reader = Reader(0.01)
        with serving(reader, Settings(batch_size=16)) as address, ThreadPoolExecutor(20) as pool:
            shared = client(address)

            def ask(number: int) -> str:
                messages = user(f"question {number}", grey(number % 250))
                answer = shared.chat.completions.create(model="reader", messages=messages)
                return answer.choices[0].message.content or ""

            list(pool.map(ask, range(50)))
            before = psutil.Process().memory_info().rss
            said = list(pool.map(ask, range(500)))
            grown = psutil.Process().memory_info().rss - before
        assert said == [f"<image> question {n} turns=1 images={n % 250}" for n in range(500)]
        assert grown < 30e6
        # One at a time each answer takes its steps alone; together they share them.
        assert sum(reader.batches) / len(reader.batches) > 3

    def test_a_request_joins_while_another_is_answered(self) -> None:
        with serving(Reader(0.01), Settings(most_tokens=100_000)) as address:
            stream = client(address).chat.completions.create(
                model="reader", messages=user("forever"), stream=True, max_tokens=100_000
            )
            next(iter(stream))
            begun = time.monotonic()
            assert self.ask(address, "next") == "next turns=1 images="
            assert time.monotonic() - begun < 60  # the other takes 1000 s
            assert next(iter(stream)).choices[0].delta.content == "again "
            stream.close()

    def test_a_failure_is_an_error_and_the_server_goes_on(
        self, address: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            self.ask(address, "fail")
        stream = client(address).chat.completions.create(
            model="reader", messages=user("then fail-later"), stream=True
        )
        with pytest.raises(openai.APIError, match="the model failed"):
            list(stream)
        assert self.ask(address, "next") == "next turns=1 images="
        assert "a planted failure" in capfd.readouterr().err

    def test_a_failure_takes_none_with_it_that_began_together(self) -> None:
        batcher, pieces = Batcher(Reader(), batch_size=2, most_waiting=2), queue.Queue[Piece]()
        for text in ("fail", "next"):
            conversation = Conversation((Turn("user", text),))
            batcher.submit(Job(Request(conversation, (), max_tokens=1), pieces.put))
        batcher.start()
        batcher.stop()
        assert [pieces.get().finish for _ in range(2)] == ["error", "length"]

    @pytest.mark.parametrize("streamed", [True, False])
    def test_a_client_that_leaves_frees_its_place(self, streamed: bool) -> None:
        reader = Reader(0.005)
        with serving(reader, Settings(batch_size=1, most_tokens=100_000)) as address:
            place = urlsplit(address)
            connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
            body = {"messages": user("forever"), "stream": streamed, "max_tokens": 100_000}
            connection.request(
                "POST",
                "/v1/chat/completions",
                json.dumps(body),
                {"Content-Type": "application/json"},
            )
            if streamed:
                connection.getresponse().read(400)
            else:
                time.sleep(0.3)
            connection.close()
            begun = time.monotonic()
            assert self.ask(address, "next") == "next turns=1 images="
            assert time.monotonic() - begun < 20 and len(reader.batches) < 5_000

    def test_too_many_waiting_are_told_to_come_again(self) -> None:
        settings = Settings(batch_size=1, most_waiting=1, most_tokens=60)
        with serving(Reader(0.01), settings) as address:
            statuses: list[int] = []
            body = json.dumps({"messages": user("forever"), "max_tokens": 60}).encode()
            threads = [
                threading.Thread(target=lambda: statuses.append(raw(address, body)[0]))
                for _ in range(6)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert sorted(set(statuses)) == [200, 503]


class TestVLMEvalKitsRequests:
    """`run.py --base-url` and its other wrappers of OpenAI-shaped servers (vlmeval/api): the
    payload is JSON with n=1 and settings, images are JPEG data URLs with options beside them."""

    def answer(self, address: str, content: list[dict[str, Any]], **settings: Any) -> str:
        body = {"model": "reader", "messages": [{"role": "user", "content": content}], "n": 1}
        status, told = raw(
            address, json.dumps(body | settings).encode(), Authorization="Bearer sk-123456"
        )
        assert status == 200, told
        return told["choices"][0]["message"]["content"].strip()

    def test_interleaved_images_stand_first_as_in_training(self, address: str) -> None:
        images = [grey(level, "JPEG") for level in (50, 200)]
        images[0]["image_url"]["detail"] = "high"
        images[1]["image_url"]["max_dynamic_patch"] = 6
        content = [images[0], {"type": "text", "text": "Question: which"}, images[1]]
        said = self.answer(address, content, max_tokens=1024, temperature=0.0)
        assert said == "<image> <image> Question: which turns=1 images=50,200"

    def test_text_alone_and_settings_that_change_nothing_here(self, address: str) -> None:
        content = [{"type": "text", "text": "is it the same"}]
        said = self.answer(address, content, temperature=0, top_k=-1, repetition_penalty=1.0)
        assert said == "is it the same turns=1 images="
