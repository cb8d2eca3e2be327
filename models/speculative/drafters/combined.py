"""Several drafters as one: the cheap one where it has something to say, the other elsewhere."""

from collections.abc import Sequence

from models.speculative.drafters import Draft, Limit, ReadsStates, SequenceDrafter
from models.speculative.drafters.in_step import Answer, Ask, DraftsInSteps, Resumes, Steps, alone
from models.speculative.model import Features


class Combined:
    """Asks the drafters in turn, such as prompt lookup and then a model; the first non-empty draft is taken.

    A drafter hears only about its own drafts; it has to catch up with what the others' have added to the text.
    """

    def __init__(self, *drafters: SequenceDrafter) -> None:
        self._drafters = drafters
        self._proposer: SequenceDrafter | None = None  # of the latest draft

    def propose(self, tokens: list[int], limit: Limit) -> Draft:
        """The first draft that has tokens, if any. Its prefill_s is the time of all that have read the prompt now;
        where none has tokens, its source is the first that has read."""
        return alone(self._first(tokens, limit, in_steps=False), _no_question)

    def steps(self, tokens: list[int], limit: Limit) -> Steps:
        """As `propose`, in steps where the drafters can."""
        return self._first(tokens, limit, in_steps=True)

    def _first(self, tokens: list[int], limit: Limit, in_steps: bool) -> Steps:
        nothing, prefill_s = Draft([]), 0.0
        for drafter in self._drafters:
            if in_steps and isinstance(drafter, DraftsInSteps):
                draft = yield from drafter.steps(tokens, limit)
            else:
                draft = drafter.propose(tokens, limit)
            if draft.prefill_s and not prefill_s:
                nothing = draft
            prefill_s += draft.prefill_s
            if draft.tokens or draft.fused:
                return self._taken(drafter, draft, tokens, prefill_s)
        return nothing._replace(prefill_s=prefill_s)

    def _taken(self, drafter: SequenceDrafter, draft: Draft, tokens: list[int], prefill_s: float) -> Draft:
        """This draft is the round's: the others that read states read them now."""
        self._proposer = drafter
        others = [each for each in self._drafters if isinstance(each, ReadsStates) and each is not drafter]
        return draft._replace(prefill_s=prefill_s + sum(each.settle(tokens) for each in others))

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the target whose hidden states one of them reads."""
        return next((drafter.taps for drafter in self._drafters if isinstance(drafter, ReadsStates)), ())

    def states(self, features: Features, rows: Sequence[int], position: int) -> None:
        """Hand them to all that read states."""
        for drafter in self._drafters:
            if isinstance(drafter, ReadsStates):
                drafter.states(features, rows, position)

    def settle(self, tokens: list[int]) -> float:
        """Of all that read states."""
        return sum(drafter.settle(tokens) for drafter in self._drafters if isinstance(drafter, ReadsStates))

    def resume(self, held: int) -> None:
        """Tell those that have a model."""
        for drafter in self._drafters:
            if isinstance(drafter, Resumes):
                drafter.resume(held)

    def observe(self, accepted: int) -> None:
        """Tell the drafter whose tokens they were."""
        if self._proposer is not None:
            self._proposer.observe(accepted)


def _no_question(ask: Ask) -> Answer:
    raise RuntimeError("a drafter that was asked alone has a question")
