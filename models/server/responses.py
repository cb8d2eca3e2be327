"""What goes over the wire: JSON, and server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

WRITE_TIMEOUT_S = 60.0  # that a client may leave bytes unread


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

    Args:
        chunks: bytes of events, one or several at a time.
        gone: called once when the client has gone, or does not read: `chunks` then ends.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], gone: Callable[[], None]) -> None:
        self.chunks, self.gone, self.status_code, self.background = chunks, gone, 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI application."""
        watch = asyncio.ensure_future(until_gone(receive))
        watch.add_done_callback(lambda task: None if task.cancelled() else self.gone())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self.chunks:
                body = {"type": "http.response.body", "body": chunk, "more_body": True}
                await asyncio.wait_for(send(body), WRITE_TIMEOUT_S)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            self.gone()
