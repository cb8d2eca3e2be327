"""What is refused before an endpoint is called: wrong keys, bodies that are too long or come too slowly."""

from __future__ import annotations

import asyncio
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models.server.errors import ApiError

OPEN_PATHS = ("/health", "/metrics")  # besides the chat page: what needs no key


class Guard:
    """An ASGI application in front of another one.

    Args:
        app: the other one.
        api_key: that requests have to bring; None: none.
        max_body: bytes of a body. body_timeout_s: within which all of it has to come.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body: int, body_timeout_s: float) -> None:
        self._app, self._max_body, self._body_timeout_s = app, max_body, body_timeout_s
        self._key = None if api_key is None else f"bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            body = b"" if scope["method"] in ("GET", "HEAD", "OPTIONS") else await self._read(scope, receive)
        except ApiError as error:
            await error.response(scope, receive, send)
            return
        if body is None:  # the client has gone
            return
        read = False

        async def replay() -> Message:
            nonlocal read
            if read or scope["method"] in ("GET", "HEAD", "OPTIONS"):
                return await receive()
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        guarded = path.startswith("/v1/") or path in ("/v1", "/tokenize", "/detokenize")
        if self._key is None or not guarded or scope["method"] == "OPTIONS":
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        if not hmac.compare_digest(kind.lower() + b" " + key.strip(), self._key):
            message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where the client has gone."""
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length[:20]) > self._max_body:
            raise self._too_long()
        try:
            return await asyncio.wait_for(self._collect(receive), self._body_timeout_s)
        except asyncio.TimeoutError:
            message = f"the body did not come within {self._body_timeout_s:g} s"
            raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None

    async def _collect(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body:
                raise self._too_long()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_long(self) -> ApiError:
        message = f"the body has more than {self._max_body} bytes"
        return ApiError(413, message, code="body_too_long", headers={"Connection": "close"})
