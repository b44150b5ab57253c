"""Reads the bodies of requests within bounds: of one, of all that are held together, and of time.

A client that sends most of a body and waits would otherwise keep it in memory for as long as it
likes, and many of them all the memory.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from megatron_gmai.evaluate.server.batching import Busy
from megatron_gmai.evaluate.server.parsing import MAX_BODY_BYTES, BadRequest

MAX_HELD_BYTES = 8 * MAX_BODY_BYTES
MAX_SECONDS = 120.0  # 64 MiB at 4.5 Mbit/s


class Bodies:
    """The bodies of all requests that are not parsed yet."""

    def __init__(self) -> None:
        self.held = 0  # bytes

    @asynccontextmanager
    async def read(self, request: HttpRequest) -> AsyncIterator[bytes]:
        """The body, which counts as held until the block ends. Raises BadRequest if it is too large
        or too slow, Busy if there is no room for it beside the others."""
        body = bytearray()
        try:
            await self._fill(body, request)
            yield bytes(body)
        finally:
            self.held -= len(body)

    async def _fill(self, body: bytearray, request: HttpRequest) -> None:
        try:
            async with asyncio.timeout(MAX_SECONDS):
                async for part in request.stream():
                    body += part
                    self.held += len(part)
                    if len(body) > MAX_BODY_BYTES:
                        raise BadRequest(
                            f"the body is larger than {MAX_BODY_BYTES} bytes", status=413
                        )
                    if self.held > MAX_HELD_BYTES:
                        raise Busy
        except ClientDisconnect as error:
            raise BadRequest("the body ends before its length") from error
        except TimeoutError as error:
            raise BadRequest(f"the body took more than {MAX_SECONDS:g} s", status=408) from error
