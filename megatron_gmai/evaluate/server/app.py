"""An OpenAI-shaped server (extra `serve`): chat completions, models, health, and a chat page."""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from megatron_gmai.data.ledger import BadSample
from megatron_gmai.evaluate.server.answers import Answer, error_response
from megatron_gmai.evaluate.server.batching import Batcher, Busy, Job
from megatron_gmai.evaluate.server.bodies import Bodies
from megatron_gmai.evaluate.server.generator import Generator, Piece
from megatron_gmai.evaluate.server.parsing import MAX_VALUES, BadRequest, Chat, parse_chat
from megatron_gmai.evaluate.server.preview import preview

_PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {"/": "index.html", "/chat.css": "chat.css", "/chat.js": "chat.js"}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'"
DECODING_AT_ONCE = 2
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """What a server allows. Without `api_key` it must be bound to loopback."""

    api_key: str | None = None
    batch_size: int = 16
    most_waiting: int = 256
    most_tokens: int = 1024
    examples: Path | None = None  # folder of example images for the page


def build_app(generator: Generator, settings: Settings) -> Starlette:
    """The application; its model thread starts and ends with it."""
    server = _Server(generator, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        server.batcher.start()
        yield
        await asyncio.to_thread(server.batcher.stop)

    routes: list[BaseRoute] = [
        Route("/health", server.health),
        Route("/v1/models", server.guarded(server.models)),
        Route("/v1/chat/completions", server.guarded(server.chat), methods=["POST"]),
        Route("/preview", server.guarded(server.preview), methods=["POST"]),
        Route("/examples", server.guarded(server.examples)),
        Route("/examples/{name}", server.guarded(server.example)),
        *(Route(path, _page_file(name)) for path, name in _PAGE_FILES.items()),
    ]
    # A site in the user's browser could reach a server without a key under a name of its own
    # (DNS rebinding); that name is then in the Host header.
    hosts = ["*"] if settings.api_key else [*LOOPBACK, "[::1]"]
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    return Starlette(routes=routes, middleware=[guard], lifespan=lifespan)


Handler = Callable[[HttpRequest], Any]


class _Server:
    def __init__(self, generator: Generator, settings: Settings) -> None:
        self.generator, self.settings = generator, settings
        self.batcher = Batcher(generator, settings.batch_size, settings.most_waiting)
        self.bodies = Bodies()
        self.begun = int(time.time())
        # Large images take much memory until they are prepared, so few are decoded at a time.
        self._decoding = asyncio.Semaphore(DECODING_AT_ONCE)

    def guarded(self, handler: Handler) -> Handler:
        """Asks for the key, and turns what is wrong with a request into OpenAI's error."""

        async def guard(request: HttpRequest) -> Response:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            key = self.settings.api_key
            if key and not hmac.compare_digest(given.encode(), key.encode()):
                return error_response("a valid API key is needed", 401)
            try:
                return await handler(request)
            except BadRequest as error:
                response = error_response(str(error), error.status, error.param)
                if error.status == 408:  # what is left of the body would be waited for
                    response.headers["Connection"] = "close"
                return response
            except Busy:
                return error_response("too many requests are waiting; try again", 503)

        return guard

    async def health(self, request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "model": self.generator.name})

    async def models(self, request: HttpRequest) -> Response:
        model = {"id": self.generator.name, "object": "model", "created": self.begun}
        return JSONResponse({"object": "list", "data": [{**model, "owned_by": "megatron_gmai"}]})

    async def preview(self, request: HttpRequest) -> Response:
        """The picture of an uploaded file as the model sees it, and its window."""
        _check_type(request, "application/octet-stream")
        async with self.bodies.read(request) as data, self._decoding:
            shown = await asyncio.to_thread(preview, data, request.query_params)
        return JSONResponse(shown)

    def _examples(self) -> dict[str, Path]:
        folder = self.settings.examples
        files = sorted(folder.iterdir()) if folder else []
        return {path.name: path for path in files if path.is_file() and not path.is_symlink()}

    async def examples(self, request: HttpRequest) -> Response:
        return JSONResponse(list(self._examples()))

    async def example(self, request: HttpRequest) -> Response:
        path = self._examples().get(request.path_params["name"])
        if path is None:
            raise BadRequest("no such example", status=404)
        return Response(path.read_bytes(), media_type="application/octet-stream")

    async def chat(self, request: HttpRequest) -> Response:
        _check_type(request, "application/json")
        async with self.bodies.read(request) as data, self._decoding:
            chat, prompt_tokens = await asyncio.to_thread(self._parse, data)
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended with the server
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job = Job(chat.request, deliver)
        self.batcher.submit(job)
        answer = Answer(self.generator.name, prompt_tokens)
        if chat.stream:
            events = answer.events(pieces, job, chat.include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        return await answer.whole(pieces, job, request)

    def _parse(self, data: bytes) -> tuple[Chat, int]:
        # Python's parser holds all threads, and each value takes a multiple of its text.
        if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
            raise BadRequest(f"the body holds more than {MAX_VALUES} values", status=413)
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON: {error}") from error
        chat = parse_chat(body, self.generator, self.settings.most_tokens)
        try:
            return chat, self.generator.prompt_tokens(chat.request)
        except BadSample as error:
            raise BadRequest(str(error), "messages") from error


def _check_type(request: HttpRequest, wanted: str) -> None:
    """A page of another site cannot send these types without asking first (CORS)."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != wanted:
        raise BadRequest(f"the content type must be {wanted}", status=415)


def _page_file(name: str) -> Handler:
    path = _PAGE / name

    async def send(request: HttpRequest) -> Response:
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(path.read_bytes(), media_type=_TYPES[path.suffix], headers=headers)

    return send
