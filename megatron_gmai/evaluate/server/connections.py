"""Connections on which no request comes are closed.

uvicorn waits for the first request, and for the rest of one that has begun, without end. Clients
whose network broke off, and strangers who only connect, would take the places of all others.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_IDLE_SECONDS = 30.0


class Connection(H11Protocol):
    """uvicorn's connection, closed after `MAX_IDLE_SECONDS` in which no request is answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_to_wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._timer.cancel()
        self._begin_to_wait()
        super().on_response_complete()

    def _begin_to_wait(self) -> None:
        self._timer = self.loop.call_later(MAX_IDLE_SECONDS, self._close_if_idle)

    def _close_if_idle(self) -> None:
        # A request that is being answered ends in `on_response_complete`.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
