"""A drafter that may fail, or draft what cannot be verified: texts go on without it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

from models.errors import in_words
from models.speculative.drafters import Budget, Draft, Drafter, HoldsBeginnings, check_draft

if TYPE_CHECKING:
    from models.speculative.model import Features
    from models.speculative.sequence import Sequence


class Degrading:
    """A `Drafter` around another one: where that raises, or `check_draft` refuses what it proposes, the sequence is
    decoded plainly from then on. A drafter that never returns cannot be ended: it shares the engine's thread.

    The text stays the target's own, as it does with any draft. What drafts for other sequences is not touched.

    Args:
        drafter: the one that may fail.
        warn: told once for each sequence that loses its drafter: what has been raised.
        refusals: errors that `begin` raises all the same: of these a sequence ends.
    """

    def __init__(
        self, drafter: Drafter, warn: Callable[[Exception], None], refusals: tuple[type[Exception], ...] = ()
    ) -> None:
        self.taps = drafter.taps
        self._drafter = drafter
        self._warn = warn
        self._refusals = refusals

    @staticmethod
    def failure(sequence: Sequence) -> str:
        """What has ended the drafting for a sequence; "": nothing has."""
        return sequence.stats.drafting_failure

    def hold(self, sequence: Sequence, slot: int) -> int:
        """As of `HoldsBeginnings`; 0 of a drafter that is none."""
        held = 0

        def hold() -> None:
            nonlocal held
            if isinstance(self._drafter, HoldsBeginnings):
                held = self._drafter.hold(sequence, slot)

        self._guard(sequence, hold)
        return held

    def release(self, slot: int) -> None:
        """As of `HoldsBeginnings`."""
        if isinstance(self._drafter, HoldsBeginnings):
            self._drafter.release(slot)

    def begin(self, sequence: Sequence) -> None:
        """As of `Drafter`."""
        self._guard(sequence, lambda: self._drafter.begin(sequence), self._refusals)

    def propose(self, sequences: Items[Sequence], budget: Budget) -> list[Draft | Exception]:
        """As of `Drafter`; nothing for sequences that have lost their drafter.

        What is raised while several are asked for is passed on: the engine then asks one by one.
        """
        sound = [each for each in sequences if not self.failure(each)]
        given: Items[Draft | Exception] = []
        if sound:
            try:
                given = self._drafter.propose(sound, budget)
            except Exception as error:
                if len(sequences) > 1:
                    raise
                given = [error]
        drafts = {}
        for sequence, draft in zip(sound, given, strict=True):
            try:
                if isinstance(draft, Exception):
                    raise draft
                check_draft(draft, sequence, budget)
                drafts[sequence] = draft._replace(checked=True)
            except Exception as error:
                self._lose(sequence, error)
        return [drafts.get(each, Draft([])) for each in sequences]

    def verified(self, sequence: Sequence, features: Features, rows: Items[int], position: int) -> None:
        """As of `Drafter`."""
        self._guard(sequence, lambda: self._drafter.verified(sequence, features, rows, position))

    def observe(self, sequence: Sequence, accepted: int) -> None:
        """As of `Drafter`."""
        self._guard(sequence, lambda: self._drafter.observe(sequence, accepted))

    def end(self, sequence: Sequence) -> None:
        """As of `Drafter`; told of sequences that have lost their drafter too."""
        try:
            self._drafter.end(sequence)
        except Exception as error:
            if not self.failure(sequence):
                self._lose(sequence, error)

    def _guard(self, sequence: Sequence, call: Callable[[], None], refusals: tuple[type[Exception], ...] = ()) -> None:
        if self.failure(sequence):
            return
        try:
            call()
        except refusals:
            raise
        except Exception as error:
            self._lose(sequence, error)

    def _lose(self, sequence: Sequence, error: Exception) -> None:
        # In words: the error's frames would keep the sequence alive.
        sequence.stats.drafting_failure = in_words(error)
        self._warn(error)
