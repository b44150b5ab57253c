"""Pieces of an answer as OpenAI's objects, whole or as server-sent events, and its errors."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from megatron_gmai.evaluate.server.batching import Job
from megatron_gmai.evaluate.server.generator import Piece


class Answer:
    """Turns the pieces of one answer into OpenAI's objects."""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.prompt_tokens, self.tokens = prompt_tokens, 0

    async def events(
        self, pieces: asyncio.Queue[Piece], job: Job, include_usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events; the job is left when the client is."""
        try:
            yield self._chunk({"role": "assistant", "content": ""}, None)
            finish = None
            while finish is None:
                piece = await pieces.get()
                finish = piece.finish
                self.tokens += piece.tokens
                if finish == "error":
                    yield f"data: {json.dumps(error_body('the model failed', 500))}\n\n"
                    return
                yield self._chunk({"content": piece.text} if piece.text else {}, finish)
            if include_usage:
                yield self._event("chat.completion.chunk", choices=[], usage=self._usage())
            yield "data: [DONE]\n\n"
        finally:
            job.left.set()

    async def whole(self, pieces: asyncio.Queue[Piece], job: Job, request: HttpRequest) -> Response:
        gone = asyncio.create_task(_until_gone(request))
        try:
            texts, finish = [], None
            while finish is None:
                piece_task = asyncio.create_task(pieces.get())
                await asyncio.wait({piece_task, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not piece_task.done():
                    piece_task.cancel()
                    return error_response("the client has left", 499)
                piece = piece_task.result()
                texts.append(piece.text)
                finish = piece.finish
                self.tokens += piece.tokens
        finally:
            gone.cancel()
            job.left.set()
        if finish == "error":
            return error_response("the model failed", 500)
        message = {"role": "assistant", "content": "".join(texts)}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return JSONResponse(
            {**self.head, "object": "chat.completion", "choices": [choice], "usage": self._usage()}
        )

    def _chunk(self, delta: dict[str, str], finish: str | None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return self._event("chat.completion.chunk", choices=[choice])

    def _event(self, kind: str, **fields: Any) -> str:
        return f"data: {json.dumps({**self.head, 'object': kind, **fields})}\n\n"

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
        }


async def _until_gone(request: HttpRequest) -> None:
    """Returns when the client has closed the connection; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def error_response(message: str, status: int, param: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(message, status, param), status_code=status)


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
