"""A job's events, as an answer of either kind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

from models.server.answers import Shape
from models.server.errors import ApiError
from models.server.jobs import Delta, Event, Gone, Job, Ping, Summary, Written
from models.server.responses import to_json

PING = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """Nobody is left to be answered."""


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def merged(events: Iterable[Event]) -> list[Event]:
    """The same events, with all that a choice has got in one."""
    found: list[Event] = []
    places: dict[int, int] = {}  # of choices, in the list
    for each in events:
        if isinstance(each, Delta):
            place = places.setdefault(each.choice, len(found))
            if place < len(found):
                before = found[place]
                assert isinstance(before, Delta)
                found[place] = each._replace(written=before.written + each.written)
                continue
        found.append(each)
    return found


async def streamed(job: Job, shape: Shape, *, usage: bool) -> AsyncIterator[bytes]:
    """The events of a stream, those that are there together in one piece. An error ends it, as an event of its own.

    usage: whether it ends with a chunk of its own for the usage; else its last chunk has it.
    """
    summaries: dict[int, Summary] = {}
    opening = [shape.opening(choice.index) for choice in job.choices]
    frames = [event(chunk) for chunk in opening if chunk is not None]
    if frames:
        yield b"".join(frames)
    while len(summaries) < len(job.choices):
        frames = []
        for came in merged(await job.pending()):
            if isinstance(came, Ping):
                frames.append(PING)
            elif isinstance(came, Gone):
                return
            elif isinstance(came, ApiError):
                yield b"".join([*frames, event(came.body)])
                return
            elif isinstance(came, Delta):
                if came.summary is not None:
                    summaries[came.choice] = came.summary
                frames += _frames(job, shape, came, summaries, usage=usage)
        if frames:
            yield b"".join(frames)
    if usage:
        yield event(shape.last_chunk(job, [summaries[i] for i in sorted(summaries)]))
    yield DONE


def _frames(job: Job, shape: Shape, delta: Delta, summaries: dict[int, Summary], *, usage: bool) -> list[bytes]:
    """A delta's event, if there is anything to tell."""
    if (text := shape.plain_text(delta)) is not None:
        start, end = shape.frame(delta.choice)
        return [start + to_json(text) + end] if text else []
    chunk = shape.chunk(delta)
    if chunk is None:
        return []
    if len(summaries) == len(job.choices) and not usage:
        chunk.update(shape.account(job, [summaries[i] for i in sorted(summaries)]))
        del chunk["usage"]
    return [event(chunk)]


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
