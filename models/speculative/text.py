"""From tokens to text, piece by piece, and where a text ends because of what it says."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from models.errors import UserError
from models.speculative.sequence import Token


class Detokenizer(Protocol):
    """Turns a stream of ids into text: all pieces and the flush together are the text of all ids."""

    def push(self, id: int) -> str:
        """Take the next id: the text that is now certain, often empty."""
        ...

    def flush(self) -> str:
        """The text still held back."""
        ...


def checked_stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple. Raises UserError for an empty one, or one that is no text."""
    try:
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    except TypeError:
        raise UserError(f"stop {stop!r}: give a text, or a list of texts") from None
    for each in stops:
        if not isinstance(each, str) or not each:
            raise UserError(f"stop string {each!r}: give a text of at least one character")
    return stops


class TextStream:
    """Reads along as tokens come, as a `sequence.Watcher`: gives their text, and ends it before a stop string.

    The text ends before the stop string that is complete first, whatever the tokens' borders: as if characters came
    one by one. Of several that end at the same character the longest counts. Text that a stop string may have begun
    with is held back until it is certain.

    Args:
        detokenizer: a fresh one; None: each id is written as a number.
        stop: stop strings.
    """

    def __init__(self, detokenizer: Detokenizer | None, stop: Sequence[str] = ()) -> None:
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._held = ""  # text that is not yet certain
        self._certain: deque[str] = deque()  # text that has become certain with each token, and was not taken
        self.stopped: str | None = None  # the stop string that ended the text

    def push(self, token: Token) -> bool:
        """Take the next token; True: a stop string is complete."""
        self._certain.append(self._add(self._detokenizer.push(token.id) if self._detokenizer else f" {token.id}"))
        return self.stopped is not None

    def take(self) -> str:
        """The text that has become certain with the next token that was not asked about; tokens may be far ahead."""
        return self._certain.popleft()

    def finish(self) -> str:
        """All that was not taken, and what was held back, when no token follows."""
        if self.stopped is None:
            self._certain.append(self._add(self._detokenizer.flush() if self._detokenizer else ""))
            if self.stopped is None:
                self._certain.append(self._held)
                self._held = ""
        rest = "".join(self._certain)
        self._certain.clear()
        return rest

    def _add(self, text: str) -> str:
        """What more text makes certain."""
        if not self._stop:
            return text
        held = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := held.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            self._held = ""
            return held[:at]
        keep = max(_begun(held, stop) for stop in self._stop)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _begun(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
