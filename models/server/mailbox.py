"""The way from the engine's thread to the event loop's."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable

from models.server.jobs import Event, Job

# Tokens of a stream that come faster wait for each other, so that they share what an event costs: 30 a second are more
# than a reader can tell apart. The first one, and the last, do not wait.
EVENT_S = 0.03


class Mailbox:
    """Hands events of jobs to the event loop, in their order.

    Urgent ones wake the loop at once, and others too while they come slowly. Once two came within 2 * `EVENT_S`, the
    loop looks by itself every `EVENT_S`, and nobody wakes it, until it finds nothing.

    Args:
        deliver: called in the event loop's thread with each event.
    """

    def __init__(self, deliver: Callable[[Job, Event], None]) -> None:
        self._deliver = deliver
        self._events: deque[tuple[Job, Event]] = deque()
        self._urgent = False  # of the engine's thread
        self._woken = False  # the loop has been woken, and has not looked yet
        self._looking = False  # the loop will look by itself
        self._looked = -math.inf  # when it did last

    def open(self) -> None:
        """The running event loop is the one that reads."""
        self._loop = asyncio.get_running_loop()

    # ------------------------------------------------------------------------------------------ the engine's thread
    def put(self, job: Job, event: Event, *, urgent: bool = True) -> None:
        """To be handed over with the next `flush`."""
        self._events.append((job, event))
        self._urgent = self._urgent or urgent

    def flush(self) -> None:
        """Wake the loop, if there is something for it that it would not find soon enough."""
        if self._events and not self._woken and (self._urgent or not self._looking):
            self._woken = True
            self.call(self._wake)
        self._urgent = False

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        """Have the event loop's thread call a function."""
        self._loop.call_soon_threadsafe(function, *arguments)

    # --------------------------------------------------------------------------------------- the event loop's thread
    def _wake(self) -> None:
        self._woken = False
        fast = self._loop.time() - self._looked < 2 * EVENT_S
        self._take()
        if fast and not self._looking:
            self._looking = True
            self._loop.call_later(EVENT_S, self._look)

    def _look(self) -> None:
        found = self._take()
        if not found:
            self._looking = False
            found = self._looking = self._take()  # what came before the other thread saw that
        if found:
            self._loop.call_later(EVENT_S, self._look)

    def _take(self) -> bool:
        """Deliver what there is; False: there was nothing."""
        found, self._looked = False, self._loop.time()
        while self._events:
            self._deliver(*self._events.popleft())
            found = True
        return found
