"""A request under way: its choices, and the events that its handler waits for."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from models.server.errors import ApiError
from models.server.scores import Score
from models.speculative.sampling import SamplingParams

if TYPE_CHECKING:
    from models.speculative.stats import GenerationStats

clock = time.perf_counter
OPENAI_REASONS = {"stop": "stop", "length": "length", "context": "length"}


class Written(NamedTuple):
    """A token of a choice; text, id and origin as of `llm.Piece`."""

    text: str
    id: int
    origin: str
    score: Score | None


@dataclass(frozen=True)
class Summary:
    """A choice that is complete.

    Args:
        stats: of its text. decode_s: from its first token to its last, other texts' steps included.
        waited_s: for a slot. drafter, length: who drafted how much. allowed: tokens that the policy allowed last.
    """

    stats: GenerationStats
    waited_s: float
    decode_s: float
    drafter: str
    length: int | str
    allowed: int = 0


class Delta(NamedTuple):
    """What a choice has got since the last one.

    choice: its index. counts: its rounds, drafted and accepted tokens so far. finish_reason: "" while it goes on;
    summary: when it has ended.
    """

    choice: int
    written: list[Written]
    counts: tuple[int, int, int]
    finish_reason: str = ""
    summary: Summary | None = None


@dataclass(frozen=True)
class Choice:
    """One text that is asked for.

    Args:
        index: among the request's choices.
        prompt: token ids.
        sampling, max_new_tokens, stop: as of `LLM.stream`. stop_ids: None for the target's own.
    """

    index: int
    prompt: list[int]
    sampling: SamplingParams
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] | None = None


class Accepted(NamedTuple):
    """The engine has taken the request."""


class Gone(NamedTuple):
    """The client has."""


class Ping(NamedTuple):
    """Nothing has come for a while."""


Event = Accepted | Delta | ApiError | Gone | Ping


@dataclass(eq=False)
class Job:
    """A request, from its arrival to its last token. Its events are put and taken in the event loop's thread.

    Args:
        choices: to be written.
        speculation: (drafter, tokens a round), each None for the server's default.
        stream: whether a delta is wanted after every step; else one for each choice, at its end.
        top_logprobs: None: log-probabilities are not wanted.

    Attributes:
        name: the id of its answer.
        open: choices that count as under way.
    """

    choices: list[Choice]
    speculation: tuple[str | None, int | str | None] = (None, None)
    stream: bool = False
    top_logprobs: int | None = None
    arrived: float = field(default_factory=clock)
    name: str = ""
    open: int = 0
    cancelled: bool = False
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)

    async def accepted(self) -> None:
        """Wait until the engine has taken it. Raises ApiError where it is refused."""
        event = await self.events.get()
        if isinstance(event, ApiError):
            raise event

    async def pending(self) -> list[Event]:
        """All events that are there, at least one: waits for it."""
        found = [await self.events.get()]
        while not self.events.empty():
            found.append(self.events.get_nowait())
        return found

    @property
    def prompt_tokens(self) -> int:
        """Of all different prompts."""
        return sum({id(choice.prompt): len(choice.prompt) for choice in self.choices}.values())
