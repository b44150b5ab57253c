"""Connections on which no request comes, or whose client does not take its answer, are closed.

uvicorn waits for the first request, for the rest of one that has begun, and until an answer can be
sent, without end. Clients whose network broke off, and strangers who only connect, would take the
places of all others.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_IDLE_SECONDS = 30.0
MAX_STALLED_SECONDS = 60.0


class Connection(H11Protocol):
    """uvicorn's connection, closed after `MAX_IDLE_SECONDS` in which no request is answered, or
    `MAX_STALLED_SECONDS` in which the client takes nothing of an answer that waits for it."""

    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_to_wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._cancel_stalled()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_client()

    def resume_writing(self) -> None:
        self._cancel_stalled()
        super().resume_writing()

    def _watch_client(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._stalled = self.loop.call_later(MAX_STALLED_SECONDS, self._close_if_stalled, unsent)

    def _cancel_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()

    def _close_if_stalled(self, unsent: int) -> None:
        if self.transport.get_write_buffer_size() < unsent:
            self._watch_client()
        else:
            self.transport.abort()

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
