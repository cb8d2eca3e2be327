"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from loguru import logger
from starlette.exceptions import HTTPException
from starlette.responses import Response

from models.errors import UserError
from models.server.responses import JsonResponse

LONGEST_VALUE = 80  # characters of a value that a message repeats


class ApiError(Exception):
    """An error that the client is told.

    Args:
        status: of HTTP.
        message: what is wrong and what to do.
        param: the field that is wrong; None: none is.
        code: for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        error = {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def response(self) -> JsonResponse:
        """For a client that has not been answered yet."""
        return JsonResponse(self.body, self.status, self.headers)


def unsupported(param: str, why: str = "") -> ApiError:
    """A field, or a value of it, that this server does not know."""
    message = f"{param!r} is not supported{': ' + why if why else ''}: leave it out"
    return ApiError(400, message, param=param, code="unsupported_parameter")


def refused(error: UserError, param: str | None = None) -> ApiError:
    """What the library has refused."""
    return ApiError(400, " ".join(str(error).split()), param=param, code="invalid_value")


def unavailable(message: str, code: str, retry_s: int) -> ApiError:
    """The server cannot take requests now."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_s)})


def internal() -> ApiError:
    """Something that is not the client's fault; the log says what."""
    return ApiError(500, "internal error: the server's log says what happened", code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Make an application answer every error in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _described(error).response

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}"
        where = "" if request.url.path.startswith("/v1/") else ": the API is below /v1"
        messages = {
            400: "the body is no JSON that can be read",
            404: f"{what}: there is no such path{where}",
            405: f"{what}: this path has other methods",
        }
        message = messages.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        logger.opt(exception=error).error(f"{request.method} {request.url.path} failed")
        return internal().response


def _described(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    errors = error.errors()
    of_field = [each for each in errors if each["loc"][:2] == errors[0]["loc"][:2]]
    # Of several types the one whose items are only too many or too few, else the one that came furthest.
    first = max(of_field, key=lambda each: (each["type"] in ("too_long", "too_short"), len(each["loc"])))
    param = _path(first["loc"][1:], error.body, missing=first["type"] == "missing") or None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return unsupported(param or "")
    if first["type"] == "missing":
        missing = "the body is missing: send JSON" if param is None else f"{param!r} is missing"
        return ApiError(400, missing, param=param, code="missing_parameter")
    if param is None:
        how = "the body has to be a JSON object, with the header Content-Type: application/json"
        return ApiError(400, how, code="invalid_json")
    return ApiError(400, f"{param} {_shown(first['input'])}: {first['msg']}", param=param, code="invalid_value")


def _path(place: Sequence[Any], body: Any, *, missing: bool) -> str:
    """Fields as people write them: messages[0].content. What is not in the body is a type that was tried."""
    text = ""
    for i, part in enumerate(place):
        if isinstance(body, list) and isinstance(part, int) and part < len(body):
            text, body = f"{text}[{part}]", body[part]
        elif isinstance(body, dict) and part in body:
            text, body = f"{text}.{part}" if text else part, body[part]
        elif missing and i == len(place) - 1:
            text = f"{text}.{part}" if text else part
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def _type(status: int) -> str:
    return {
        401: "authentication_error",
        429: "rate_limit_error",
        500: "server_error",
        503: "service_unavailable_error",
    }.get(status, "invalid_request_error")
