"""The process: its socket, its signals, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from models.cli.command import INTERRUPTED, USER_ERROR, one_line
from models.cli.default import everyday_target
from models.errors import UserError
from models.server.settings import ServerSettings, parse_settings

AFTER_DRAINING_S = 5  # for connections to close


def command(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal comes; returns the exit code. Raises UserError for a wrong command line."""
    settings = parse_settings(argv, choose=everyday_target)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'tt-speculative-llama[server]'") from None
    return serve(settings)


def serve(settings: ServerSettings) -> int:
    """Listen, load, answer; returns the exit code."""
    from loguru import logger

    from models.device import check_device

    logger.remove()
    logger.add(sys.stderr, level="WARNING" if settings.quiet else "INFO", format="{message}")
    check_device(settings.device)
    with _listening(settings) as listener:
        return _serve(settings, listener)


def _serve(settings: ServerSettings, listener: socket.socket) -> int:
    import uvicorn
    from loguru import logger

    from models.server.app import create_app
    from models.server.connections import BoundedProtocol

    problem: list[Exception] = []

    def failed(error: Exception) -> None:
        problem.append(error)
        server.should_exit = True

    def load():
        from models.llm import LLM
        from models.loading import open_pair

        return LLM(open_pair(settings.engine))

    app = create_app(settings, load, failed)
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        log_config=None,
        log_level="info" if settings.access_log else "warning",
        access_log=settings.access_log,
        timeout_graceful_shutdown=int(settings.drain_s) + AFTER_DRAINING_S,
        server_header=False,
    )
    if settings.access_log:
        logging.basicConfig(stream=sys.stderr, format="%(message)s")
    server = _server(config, app.state.context.engine, settings)
    if settings.is_open and settings.api_key is None:
        logger.warning(f"{settings.host} can be reached from elsewhere and no --api-key is set: anyone may use it")
    logger.info(f"loading {settings.model_name}; {address}/v1 answers when it is done")
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if problem:
        if isinstance(problem[0], UserError):
            print("error:", one_line(problem[0]), file=sys.stderr)
            return USER_ERROR
        raise problem[0]
    return INTERRUPTED if server.interrupted else 0


def _server(config, engine, settings: ServerSettings):
    """A uvicorn server that drains the engine when it is told to end."""
    import uvicorn

    class Server(uvicorn.Server):
        interrupted = False

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for each, handler in before.items():
                    signal.signal(each, handler)

        async def serve(self, sockets=None) -> None:
            self._loop = asyncio.get_running_loop()
            await super().serve(sockets)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.interrupted = self.interrupted or sig == signal.SIGINT
            if self.should_exit:
                self.force_exit = True  # a second signal does not wait
            self.should_exit = True
            seconds = 0.0 if self.force_exit else settings.drain_s
            self._loop.call_soon_threadsafe(engine.drain, seconds)

    return Server(config)


@contextmanager
def _listening(settings: ServerSettings) -> Iterator[socket.socket]:
    """A socket at the host and port. Raises UserError where there can be none."""
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        ports_own = error.errno in (errno.EADDRINUSE, errno.EACCES)
        reason = os.strerror(error.errno) if ports_own and error.errno else error.strerror or error
        raise UserError(
            f"cannot listen at {where} ({reason}): choose another --{'port' if ports_own else 'host'}"
        ) from None
    with listener:
        yield listener
