"""Texts written in rounds of draft, verify, accept, emit. Plain decoding is the same loop without a drafter."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from models.errors import UserError
from models.speculative.drafters import MAX_DRAFT_LENGTH, Budget, Draft
from models.speculative.model import LOGITS, FusedRounds, LanguageModel, Rows
from models.speculative.sequence import WAITING, Request, Sequence, Token
from models.speculative.stats import GenerationStats, Round
from models.speculative.verify import Verified, first_token, verify, verify_sequentially

NO_DRAFT = Draft([])


class Emission(NamedTuple):
    """What one step has added to a sequence's text. `sequence.stats.finish_reason` says whether it has ended."""

    sequence: Sequence
    tokens: list[Token]


class Engine:
    """Writes the texts of several sequences with one target, each distributed as the target alone would have written
    it.

    A sequence goes through these steps:

    1. Prefill: the target reads the prompt and gives the first token. The drafter is not called before that token has
       been handed out, so that the time to first token is plain decoding's.
    2. Draft: the drafter proposes tokens, as many as the sequence's policy allows their source, at most as many as the
       verification has rows for, and at most one less than may still be emitted.
    3. Verify: one target forward over the last token and the drafted ones, K+1 rows. It overwrites whatever an earlier
       rejection left in the cache, so that nothing has to be rolled back. Of a tree the cache keeps the accepted rows;
       what it cannot keep is fed again with the next round. A drafter may leave steps 2 and 3 to a fused round.
    4. Accept: a prefix of the draft, or a path down the tree, and one token of the target's own after it.
    5. Emit, and go on with 2. Nothing follows a stop token or the end of a stop string.

    Sequences beyond the target's slots wait. `step` takes every running sequence one round further, one after the
    other.

    Args:
        target: verifies; its limits say how many sequences have a slot.
        clock: seconds, for statistics and for the policies' costs.
    """

    def __init__(self, target: LanguageModel, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.target = target
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self._free = list(range(target.limits.slots))
        self._clock = clock

    def add(self, request: Request, stats: GenerationStats | None = None) -> Sequence:
        """Take a request; it starts with the next step that finds a free slot.

        stats: a fresh one, filled while tokens come. Raises UserError for a request that cannot be written: see
        `Request.check`.
        """
        limits = self.target.limits
        request.check(limits)
        sequence = Sequence(request, limits.positions, stats)
        self.waiting.append(sequence)
        return sequence

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.running or self.waiting)

    def step(self) -> list[Emission]:
        """Start sequences that wait where slots are free, take the others one round further: what was written.

        An error ends only the sequence that it happened in, which keeps it as `error`.
        """
        emissions = []
        for sequence in [*self.running, *self.waiting]:
            if sequence.slot == WAITING and not self._free:
                break
            try:
                tokens = self.advance(sequence)
            except Exception as error:
                sequence.error, tokens = error, []
                self.abort(sequence)
            emissions.append(Emission(sequence, tokens))
        return emissions

    def advance(self, sequence: Sequence) -> list[Token]:
        """Take one sequence one round further, or start it: its new tokens.

        Raises UserError if it has to wait for a slot, RuntimeError if it has ended.
        """
        if sequence.finished:
            raise RuntimeError("the sequence has ended: nothing follows")
        if sequence.slot == WAITING:
            if not self._free:
                raise UserError(
                    f"all {len(self.running)} slots are taken by texts that are not complete: finish or close one, or "
                    "load the model with more slots"
                )
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.slot = self._free.pop(0)
            tokens = self._first(sequence)
        else:
            tokens = self._round(sequence)
        if sequence.finished:
            self._leave(sequence)
        return tokens

    def abort(self, sequence: Sequence) -> None:
        """End a sequence now, with the finish reason "interrupted"; nothing happens to one that has ended."""
        if not sequence.finished:
            sequence.stats.finish_reason = "interrupted"
        if sequence in self.running:
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    # ------------------------------------------------------------------------------------------------- one sequence
    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if sequence.request.drafter is not None and sequence.begun:
            sequence.request.drafter.end(sequence)
        self.target.free(sequence.slot)
        self._free.append(sequence.slot)

    def _first(self, sequence: Sequence) -> list[Token]:
        """Read the prompt and choose the first token."""
        began = self._clock()
        drafter, want = sequence.request.drafter, LOGITS
        if drafter is not None and drafter.taps:
            want = want._replace(taps=drafter.taps)
        step = self.target.extend([Rows(sequence.slot, sequence.request.prompt, 0, last=True)], want)
        token = Token(first_token(sequence, step), "prefill")
        sequence.cached, sequence.prompt_step = len(sequence.tokens), step
        tokens = sequence.taken([token])
        sequence.stats.ttft_s = self._clock() - began
        return tokens

    def _round(self, sequence: Sequence) -> list[Token]:
        """Draft, verify, accept, emit."""
        clock, stats, drafter = self._clock, sequence.stats, sequence.request.drafter
        began = clock()
        if not sequence.begun:
            self._begin(sequence)
        draft, draft_s = NO_DRAFT, 0.0
        verified: Verified | None = None
        sequence.wanted = 0
        if drafter is not None:
            mark = clock()
            draft = drafter.propose([sequence], Budget(self.target.limits.rows))[0]
            if draft.fused is not None:
                draft, verified = run_fused(sequence, draft, *draft.fused)
            draft_s = clock() - mark
        if verified is None:
            check = verify if sequence.request.verification == "batched" else verify_sequentially
            verified = check(self.target, sequence, draft, clock, drafter.taps if drafter else ())
        sequence.cached = verified.cached
        for features, rows, position in verified.computed:
            assert drafter is not None  # whose taps they are
            drafter.verified(sequence, features, rows, position)

        accepted, drafted = len(verified.kept), len(draft.tokens)
        round_ = Round(
            drafted,
            accepted,
            emitted=0,
            draft_s=draft_s - draft.prefill_s,
            verify_s=verified.seconds,
            source=draft.source,
            proposed=tuple(draft.tokens),
            parents=None if draft.parents is None else tuple(draft.parents),
            kept=tuple(verified.kept),
            path_probs=tuple(draft.path_probs),
        )
        last = "plain" if not drafted else "bonus" if accepted == round_.depth else "corrected"
        block = [Token(draft.tokens[i], "drafted") for i in verified.kept] + [Token(verified.next_id, last)]
        remaining = sequence.remaining
        tokens = sequence.taken(block)
        round_.emitted = len(tokens)
        round_.cut = len(tokens) <= accepted or sequence.wanted > remaining - 1
        stats.rounds.append(round_)
        if draft.prefill_s:
            stats.draft_prefill_s += draft.prefill_s
            sequence.policy.read(draft.source, draft.prefill_s)
        if drafted and drafter is not None:
            drafter.observe(sequence, accepted)
        sequence.policy.update(round_)
        spent = clock() - began
        round_.host_s = spent - draft_s - verified.seconds
        stats.decode_s += spent
        return tokens

    def _begin(self, sequence: Sequence) -> None:
        """What a sequence needs before its first round, and not before its first token."""
        sequence.begin()
        if sequence.request.drafter is not None and sequence.prompt_step is not None:
            sequence.request.drafter.begin(sequence, sequence.prompt_step)
        sequence.prompt_step = None


def run_fused(sequence: Sequence, draft: Draft, rounds: FusedRounds, k: int) -> tuple[Draft, Verified | None]:
    """Run a round that drafts k tokens and verifies them as one program: (the draft with its tokens, what was decided).

    Nothing is decided for a sequence that is sampled, or is to be verified token by token: the draft alone counts.
    """
    tokens = sequence.tokens
    end = tokens[-(MAX_DRAFT_LENGTH + 1) :]
    drafted, verified, accepted = rounds.run(end, len(tokens) - len(end), k)
    draft, request = draft._replace(tokens=drafted), sequence.request
    if not request.sampling.greedy or request.verification != "batched":
        return draft, None
    features = rounds.features
    computed = () if features is None else ((features, range(accepted + 1), len(tokens) - 1),)
    return draft, Verified(list(range(accepted)), verified[accepted], len(tokens) + accepted, 0.0, computed)
