"""What goes over the wire: JSON, and server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

WRITE_TIMEOUT_S = 60.0  # that a client may leave bytes unread
PING_S = 15.0  # without anything to send, after which a comment keeps the connection open
LOOK_S = 5.0  # between looks at a stream


def to_json(value: Any) -> bytes:
    """Compact JSON; a lone surrogate, which is no character, as a question mark."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


class JsonResponse(Response):
    """A complete answer."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(to_json(content), status, headers)


async def until_gone(receive: Receive) -> None:
    """Wait until the client has closed its connection. The request's body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events.

    A timer for each chunk would cost as much as the chunk: one task looks now and then whether the client still reads.

    Args:
        chunks: bytes of events, one or several at a time.
        gone: called when the client has gone, or does not read: `chunks` then ends.
        ping: called where there was nothing to send for a while.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], gone: Callable[[], None], ping: Callable[[], None]) -> None:
        self.chunks, self.gone, self.ping, self.status_code, self.background = chunks, gone, ping, 200, None
        self._sending, self._since = False, time.monotonic()
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI application."""
        watch = asyncio.ensure_future(self._watch(receive, asyncio.current_task()))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self.chunks:
                self._sending, self._since = True, time.monotonic()
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                self._sending = False
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            self.gone()

    async def _watch(self, receive: Receive, writer: asyncio.Task | None) -> None:
        left = asyncio.ensure_future(until_gone(receive))
        try:
            while True:
                await asyncio.wait({left}, timeout=LOOK_S)
                idle_s = time.monotonic() - self._since
                if left.done():
                    self.gone()
                    return
                if self._sending and idle_s > WRITE_TIMEOUT_S and writer is not None:
                    writer.cancel("the client does not read")
                    return
                if not self._sending and idle_s > PING_S:
                    self._since = time.monotonic()
                    self.ping()
        finally:
            left.cancel()
