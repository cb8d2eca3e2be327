"""A job's events, as an answer of either kind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from models.server.answers import Shape
from models.server.errors import ApiError
from models.server.jobs import Delta, Gone, Job, Summary, Written
from models.server.responses import to_json

PING_S = 15.0  # without an event, after which a comment keeps the connection open
PING = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """Nobody is left to be answered."""


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


async def streamed(job: Job, shape: Shape, *, usage: bool) -> AsyncIterator[bytes]:
    """The events of a stream. An error ends it, as an event of its own.

    usage: whether it ends with a chunk of its own for the usage; else its last chunk has it.
    """
    summaries: dict[int, Summary] = {}
    opening = [shape.opening(choice.index) for choice in job.choices]
    chunks = [event(chunk) for chunk in opening if chunk is not None]
    if chunks:
        yield b"".join(chunks)
    while len(summaries) < len(job.choices):
        try:
            came = job.events.get_nowait() if not job.events.empty() else await _next(job)
        except asyncio.TimeoutError:
            yield PING
            continue
        if isinstance(came, Gone):
            return
        if isinstance(came, ApiError):
            yield event(came.body)
            return
        if not isinstance(came, Delta):
            continue
        if came.summary is not None:
            summaries[came.choice] = came.summary
        chunk = shape.chunk(came)
        if chunk is None:
            continue
        if len(summaries) == len(job.choices) and not usage:
            chunk.update(shape.account(job, [summaries[i] for i in sorted(summaries)]))
            del chunk["usage"]
        yield event(chunk)
    if usage:
        yield event(shape.last_chunk(job, [summaries[i] for i in sorted(summaries)]))
    yield DONE


async def whole(job: Job, shape: Shape) -> dict[str, Any]:
    """The complete answer. Raises ApiError, and ClientGone."""
    texts: dict[int, tuple[list[Written], str]] = {}
    summaries: dict[int, Summary] = {}
    while len(summaries) < len(job.choices):
        came = await job.events.get()
        if isinstance(came, ApiError):
            raise came
        if isinstance(came, Gone):
            raise ClientGone
        if isinstance(came, Delta) and came.summary is not None:
            texts[came.choice] = came.written, came.finish_reason
            summaries[came.choice] = came.summary
    order = range(len(job.choices))
    return shape.whole(job, [texts[i] for i in order], [summaries[i] for i in order])


async def _next(job: Job):
    return await asyncio.wait_for(job.events.get(), PING_S)
