"""The application: endpoints, error handlers, middleware, the chat page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, Response

from models.cli.environment import project_version
from models.server import routes, text_routes
from models.server.context import Context
from models.server.engine_thread import EngineThread
from models.server.errors import ApiError, add_handlers
from models.server.guard import Guard
from models.server.metrics import Metrics

if TYPE_CHECKING:
    from models.llm import LLM
    from models.server.settings import ServerSettings

PAGE = Path(__file__).resolve().parent / "page"
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "frame-ancestors 'none'",  # which a page cannot say of itself; the rest it does
    "X-Content-Type-Options": "nosniff",
}


def create_app(settings: ServerSettings, load: Callable[[], LLM], failed: Callable[[Exception], None]) -> FastAPI:
    """An application that loads its models when it starts.

    Args:
        settings: of the server.
        load: makes the models. failed: called where that raised.
    """
    metrics = Metrics(settings.model_name)
    engine = EngineThread(load, metrics, settings.queue, failed, settings.audit_every)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    app = FastAPI(
        title="Speculative Llama",
        version=project_version(),
        lifespan=lifespan,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a path with a slash behind it is another: 404, in the form of errors
    )
    app.state.context = Context(settings.model_name, engine, metrics)
    app.include_router(routes.router)
    app.include_router(text_routes.router)
    add_handlers(app)
    app.add_middleware(
        Guard, api_key=settings.api_key, max_body=settings.max_body_bytes, body_timeout_s=settings.body_timeout_s
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    add_page(app, PAGE)
    _document(app)
    return app


def _document(app: FastAPI) -> None:
    """Leave out of the API's document what FastAPI says of every endpoint: here errors in a body are 400."""
    made = app.openapi()
    for path in made["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        made["components"]["schemas"].pop(name, None)


def add_page(app: FastAPI, folder: Path) -> None:
    """Serve a folder's files, index.html at /.

    A route for each: one mount for all would take the place of "this path has other methods" everywhere else.
    """
    if not (folder / "index.html").is_file():

        @app.get("/", include_in_schema=False)
        async def no_page(request: Request) -> Response:
            raise ApiError(404, "this installation has no chat page: use the API below /v1", code="no_page")

        return
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        path = "/" if name == "index.html" else f"/{name}"
        app.add_api_route(path, _sender(file), methods=["GET", "HEAD"], include_in_schema=False)


def _sender(file: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def send_file() -> FileResponse:
        return FileResponse(file, headers=PAGE_HEADERS)

    return send_file
