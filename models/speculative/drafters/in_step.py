"""Drafting for several sequences in step: one forward of the draft model for each drafted position, not for each
sequence.

A drafter that can be asked in steps says what rows it needs of the model (`Ask`), is sent what they gave, and goes on;
alone it asks its own slot. So proposals in company are those that it makes alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor

from models.speculative.drafters import Budget, Draft, Limit, PerSequence, SequenceDrafter
from models.speculative.model import IDS, LOGITS, LanguageModel, Paged, Rows
from models.speculative.sequence import Sequence


class Reads(Enum):
    """What is sent back for an `Ask`."""

    LOGITS = "logits"  # [n, V], of a chain those of the last row alone
    BEST = "best"  # (1.0, the place of the last row's greatest logit)
    ID = "id"  # (1.0, the target's id for it): no more than that leaves the device
    LIKELIEST = "likeliest"  # (probability, place) of the last row's likeliest token; NaN where logits are not finite
    NOTHING = "nothing"  # as LIKELIEST, but the rows are any number of a text that is read before it is drafted for


class Ask(NamedTuple):
    """Rows of the draft model that a drafter needs in its sequence's slot; as of `model.Rows`."""

    tokens: Items[int]
    position: int
    reads: Reads = Reads.LOGITS
    parents: Items[int] | None = None


Answer: TypeAlias = "Tensor | tuple[float, int]"
Steps: TypeAlias = Generator[Ask, Answer, Draft]


@runtime_checkable
class DraftsInSteps(Protocol):
    """A `SequenceDrafter` that can be asked in steps."""

    def steps(self, tokens: list[int], limit: Limit) -> Steps:
        """As `SequenceDrafter.propose`, as a dialogue: yields what it needs of the model."""
        ...


@runtime_checkable
class Resumes(Protocol):
    """A `SequenceDrafter` that can go on from a beginning that its model's cache holds already."""

    def resume(self, held: int) -> None:
        """The cache holds the first `held` tokens of the text; called before anything is proposed."""
        ...


def alone(steps: Steps, answer: Callable[[Ask], Answer]) -> Draft:
    """Hold the dialogue for one sequence."""
    try:
        ask = next(steps)
        while True:
            ask = steps.send(answer(ask))
    except StopIteration as done:
        return cast("Draft", done.value)


def answer_of(logits: Tensor, reads: Reads) -> Answer:
    """What is read of logits [n, V]."""
    return logits if reads is Reads.LOGITS else _answers(logits[-1:], reads)[0]


def _answers(logits: Tensor, reads: Reads) -> list[tuple[float, int]]:
    """Of each row of [n, V]."""
    if reads is Reads.BEST:
        return [(1.0, place) for place in logits.argmax(-1).tolist()]
    chances, places = torch.softmax(logits, -1, dtype=torch.float32).max(-1)
    return list(zip(chances.tolist(), places.tolist(), strict=True))


@dataclass
class _Talk:
    """A dialogue under way."""

    sequence: Sequence
    steps: Steps
    ask: Ask | None = None
    result: Draft | Exception | None = None
    read: int = 0  # tokens of its present question that were read in earlier steps
    prefill_s: float = 0.0  # that reading took
    wanted: int = 0  # as of `Sequence`, from the step in which it began
    asked: bool = False


class InStep(PerSequence):
    """Sequence drafters that share one draft model, asked in step. Those that cannot be are asked one after the other.

    What they have to read before they can draft is bounded in each step, as prompts are for the target; a sequence
    whose drafter is still reading has no round meanwhile.

    Where the draft model's cache has pages (`Paged`), a sequence that may reuse beginnings is read from where the cache
    holds it: `stats.draft_reused_tokens`. With taps that is settled before the target reads, which has to give the
    states of what follows: see `HoldsBeginnings`.

    Args:
        make, taps: as of `PerSequence`.
        model: of which the drafters have a slot each, the sequence's.
    """

    def __init__(
        self, make: Callable[[Sequence], SequenceDrafter], model: LanguageModel, taps: tuple[int, ...] = ()
    ) -> None:
        super().__init__(make, taps, model.free)
        self._model = model
        self._paused: dict[Sequence, _Talk] = {}
        self._resumed: set[Sequence] = set()  # those that have not been drafted for yet

    def hold(self, sequence: Sequence, slot: int) -> int:
        """Promise a sequence pages of a head's cache: see `HoldsBeginnings`."""
        return self._promise(sequence, slot) if self.taps else 0

    def release(self, slot: int) -> None:
        """Give a slot's pages back."""
        self._model.free(slot)

    def begin(self, sequence: Sequence) -> None:
        """Make the sequence's drafter, and promise it pages of the model's cache, if that is not done."""
        super().begin(sequence)
        drafter, stats = self.of(sequence), sequence.stats
        if not isinstance(drafter, Resumes):
            return
        held = stats.reused_tokens if self.taps else self._promise(sequence, sequence.slot)
        if held:
            stats.draft_reused_tokens = held
            sequence.policy.holds(held)
            drafter.resume(held)
            if not self.taps:
                self._resumed.add(sequence)

    def _promise(self, sequence: Sequence, slot: int) -> int:
        """Leading tokens that the model's cache holds."""
        model, request = self._model, sequence.request
        positions = model.limits.positions
        if not isinstance(model, Paged) or len(request.prompt) > positions:  # in this case nothing will be drafted
            return 0
        known = request.prompt if request.reuse else ()
        return model.reserve(slot, known, min(sequence.positions, positions)) or 0

    def end(self, sequence: Sequence) -> None:
        """Forget the sequence's drafter."""
        self._paused.pop(sequence, None)
        self._resumed.discard(sequence)
        super().end(sequence)

    def propose(self, sequences: Items[Sequence], budget: Budget) -> Items[Draft | Exception]:
        """Drafts for all of them, with one forward for each drafted position."""
        lone = budget.sequences == 1 and len(sequences) == 1 and not self._paused
        if lone and sequences[0] not in self._resumed:
            return super().propose(sequences, budget)
        # What follows a beginning is read by the model, which takes any number of rows.
        rows = len(sequences[0].tokens) if lone else budget.prompt_rows
        self._resumed.difference_update(sequences)
        began = time.perf_counter()
        own_s = 0.0  # of those that had no question
        drafts: list[Draft | Exception | _Talk] = []
        for sequence in sequences:
            mark = time.perf_counter()
            drafts.append(self._begun(sequence, budget))
            if not isinstance(drafts[-1], _Talk):
                own_s += time.perf_counter() - mark
        talks = [each for each in drafts if isinstance(each, _Talk)]
        self._read([each for each in talks if each.ask and each.ask.reads is Reads.NOTHING], rows)
        forwards = 0
        while asking := [each for each in talks if each.ask and each.ask.reads is not Reads.NOTHING]:
            self._hear(asking)
            forwards += 1
        seconds = time.perf_counter() - began - own_s - sum(each.prefill_s for each in talks)
        together = sum(each.asked for each in talks)
        shared = {"together": together, "forwards": forwards, "seconds": seconds}
        return [self._told(each, shared) if isinstance(each, _Talk) else each for each in drafts]

    def _begun(self, sequence: Sequence, budget: Budget) -> Draft | Exception | _Talk:
        """A dialogue with its first question, or what came of it without one."""
        if (talk := self._paused.pop(sequence, None)) is not None:
            sequence.wanted, talk.prefill_s = talk.wanted, 0.0
            return talk
        drafter, limit = self.of(sequence), budget.share(sequence)
        if not isinstance(drafter, DraftsInSteps):
            return self._timed(sequence, limit)
        began = time.perf_counter()
        talk = _Talk(sequence, drafter.steps(sequence.tokens, limit))
        self._go_on(talk, None)
        if talk.ask is not None:
            return talk
        draft = talk.result
        assert draft is not None
        if isinstance(draft, Draft):
            draft = draft._replace(seconds=time.perf_counter() - began - draft.prefill_s)
        return draft

    @staticmethod
    def _go_on(talk: _Talk, answer: Answer | None) -> None:
        """The next question, or what came of it."""
        talk.ask, talk.read = None, 0
        try:
            talk.ask = next(talk.steps) if answer is None else talk.steps.send(answer)
        except StopIteration as done:
            talk.result = done.value
        except Exception as error:
            talk.result = error

    def _told(self, talk: _Talk, shared: dict[str, Any]) -> Draft | Exception:
        if talk.ask is not None:  # there is more to read
            talk.wanted = talk.sequence.wanted
            self._paused[talk.sequence] = talk
            return Draft([], prefill_s=talk.prefill_s, waits=True)
        draft = talk.result
        assert draft is not None
        if isinstance(draft, Exception):
            return draft
        prefill_s = draft.prefill_s + talk.prefill_s
        return draft._replace(prefill_s=prefill_s, **shared if talk.asked else {})

    # --------------------------------------------------------------------------------------------------- the model
    def _read(self, talks: list[_Talk], left: int) -> None:
        """Answer questions that read a text, as far as the rows of this step go."""
        asks = []
        for talk in talks:
            assert talk.ask is not None
            tokens = talk.ask.tokens[talk.read : talk.read + left]
            if tokens:
                asks.append((talk, talk.ask._replace(tokens=tokens, position=talk.ask.position + talk.read)))
                left -= len(tokens)
        if not asks:
            return
        began = time.perf_counter()
        answers = self._computed([(talk.sequence.slot, ask) for talk, ask in asks])
        share_s = (time.perf_counter() - began) / sum(len(ask.tokens) for _, ask in asks)
        for (talk, ask), answer in zip(asks, answers, strict=True):
            assert talk.ask is not None
            talk.prefill_s += share_s * len(ask.tokens)
            talk.read += len(ask.tokens)
            if isinstance(answer, Exception):
                talk.ask, talk.result = None, answer
            elif talk.read == len(talk.ask.tokens):
                self._go_on(talk, answer)

    def _hear(self, talks: list[_Talk]) -> None:
        """Answer everybody's question by one forward."""
        answers = self._computed([(talk.sequence.slot, cast("Ask", talk.ask)) for talk in talks])
        for talk, answer in zip(talks, answers, strict=True):
            talk.asked = True
            if isinstance(answer, Exception):
                talk.ask, talk.result = None, answer
            else:
                self._go_on(talk, answer)

    def _computed(self, asks: list[tuple[int, Ask]]) -> list[Answer | Exception]:
        """What is read of each slot's rows. If the forward fails, each is computed by itself."""
        rows = [Rows(slot, ask.tokens, ask.position, ask.parents, ask.parents is None) for slot, ask in asks]
        try:
            if all(ask.reads is Reads.ID for _, ask in asks):
                return [(1.0, ids[-1]) for ids in self._model.extend(rows, IDS).ids()]
            if any(ask.reads is Reads.ID for _, ask in asks):  # beside others that need logits
                return self._apart(asks)
            step = self._model.extend(rows, LOGITS)
            logits = [step.logits(i) for i in range(len(rows))]
            found: dict[int, Answer] = {i: logits[i] for i, (_, ask) in enumerate(asks) if ask.reads is Reads.LOGITS}
            for kind in (Reads.BEST, Reads.LIKELIEST, Reads.NOTHING):
                mine = [i for i, (_, ask) in enumerate(asks) if ask.reads is kind]
                if mine:
                    answers = _answers(torch.cat([logits[i][-1:] for i in mine]), kind)
                    found.update(zip(mine, answers, strict=True))
            return [found[i] for i in range(len(asks))]
        except Exception as error:
            if len(asks) == 1:
                return [error]
            return [answer for ask in asks for answer in self._computed([ask])]

    def _apart(self, asks: list[tuple[int, Ask]]) -> list[Answer | Exception]:
        """Ids by one forward, all else by another."""
        found: dict[int, Answer | Exception] = {}
        for of_ids in (True, False):
            mine = [i for i, (_, ask) in enumerate(asks) if (ask.reads is Reads.ID) == of_ids]
            found.update(zip(mine, self._computed([asks[i] for i in mine]), strict=True))
        return [found[i] for i in range(len(asks))]
