"""Connections whose clients take their time: uvicorn bounds neither heads of requests nor bytes that stay unread."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 30.0  # from a connection's beginning, or its last answer, to the end of the next request's head
UNREAD_S = 60.0  # in which a client has to read something, if there is something
LOOK_S = 5.0  # between looks at a connection


class BoundedProtocol(H11Protocol):
    """uvicorn's, which closes a connection that nothing can be expected of. Of bodies see `guard.Guard`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As of `asyncio.Protocol`."""
        super().connection_made(transport)
        self._waits_since = self._stuck_since = self.loop.time()
        self._unread = 0
        self._timer = self.loop.call_later(LOOK_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """As of `asyncio.Protocol`."""
        self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """As of `H11Protocol`."""
        self._waits_since = self.loop.time()
        super().on_response_complete()

    def _look(self) -> None:
        now, unread = self.loop.time(), self.transport.get_write_buffer_size()
        if not unread or unread != self._unread:
            self._unread, self._stuck_since = unread, now
        answered = self.cycle is None or self.cycle.response_complete
        if unread and now - self._stuck_since > UNREAD_S:
            self.transport.abort()
        elif answered and now - self._waits_since > HEAD_S:
            self.transport.close()
        self._timer = self.loop.call_later(LOOK_S, self._look)
