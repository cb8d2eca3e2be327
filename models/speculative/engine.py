"""Texts written in rounds of draft, verify, accept, emit. Plain decoding is the same loop without a drafter."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import NamedTuple

from models.speculative.drafters import MAX_DRAFT_LENGTH, Budget, Draft, Drafter, check_draft
from models.speculative.model import FusedRounds, LanguageModel, Rows, in_turns
from models.speculative.scheduler import PROMPT_ROWS, Scheduler, release
from models.speculative.sequence import WAITING, Request, Sequence, Token
from models.speculative.stats import GenerationStats, Joint, Round
from models.speculative.verify import (
    Part,
    Result,
    Verified,
    compute_each,
    decide,
    first_token,
    verification,
    verify_sequentially,
)

NO_DRAFT = Draft([])


class Emission(NamedTuple):
    """What one step has added to a sequence's text. `sequence.stats.finish_reason` says whether it has ended."""

    sequence: Sequence
    tokens: list[Token]


class _Turn:
    """One sequence's round while a step is under way."""

    __slots__ = ("draft", "draft_s", "part", "round", "sequence", "taps", "verified")

    def __init__(self, sequence: Sequence, draft: Draft, draft_s: float) -> None:
        drafter = sequence.request.drafter
        self.sequence = sequence
        self.draft = draft
        self.draft_s = draft_s  # reading of prompts apart
        self.taps = drafter.taps if drafter is not None else ()
        self.part: Part | None = None
        self.verified: Verified | None = None
        self.round: Round | None = None


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

    `step` takes every running sequence one round further, with ONE target forward for all of them: verifications of
    any length, and pieces of prompts beside them. Where the target bounds the rows of a forward (`Limits.batch_rows`),
    policies that choose draft lengths keep to what fits, and for others sequences take turns. Each has its own drafter,
    draft length, sampling and end; nobody waits for another one's rejection. Who starts when: see
    `scheduler.Scheduler`.

    Args:
        target: verifies; its limits say how many sequences have a slot.
        clock: seconds, for statistics and for the policies' costs.
        prompt_rows: as of `Scheduler`.
    """

    def __init__(
        self,
        target: LanguageModel,
        *,
        clock: Callable[[], float] = time.perf_counter,
        prompt_rows: int = PROMPT_ROWS,
    ) -> None:
        self.target = target
        self._scheduler = Scheduler(target, prompt_rows)
        self.running = self._scheduler.running
        self.waiting = self._scheduler.waiting
        self._clock = clock

    def add(self, request: Request, stats: GenerationStats | None = None) -> Sequence:
        """Take a request; it starts with the next step that finds room for it.

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

    def step(self, chosen: Collection[Sequence] | None = None) -> list[Emission]:
        """Start sequences that wait where there is room, take all that run one round further: what was written.

        An error ends only the sequence that it happened in, which keeps it as `error`; it is among those returned.

        chosen: these sequences alone; others stay where they are. Raises UserError if none of them can do anything
        before others end.
        """
        refused = self._scheduler.admit(chosen)
        for sequence in refused:
            self.abort(sequence)
        running = [each for each in self.running if chosen is None or each in chosen]
        if not (running or refused) and any(chosen is None or each in chosen for each in self.waiting):
            raise self._scheduler.no_room()
        return [Emission(sequence, []) for sequence in refused] + self._take(running)

    def advance(self, sequence: Sequence) -> list[Token]:
        """Take one sequence one round further, or start it: its new tokens.

        Raises UserError if it has to wait for room, RuntimeError if it has ended, and whatever ends it.
        """
        if sequence.finished:
            raise RuntimeError("the sequence has ended: nothing follows")
        if sequence.slot == WAITING and not self._scheduler.start(sequence):
            raise self._scheduler.no_room()
        emissions = self._take([sequence])
        if sequence.error is not None:
            raise sequence.error
        return emissions[0].tokens if emissions else []

    def abort(self, sequence: Sequence) -> None:
        """End a sequence now, with the finish reason "interrupted"; nothing happens to one that has ended."""
        if not sequence.finished:
            sequence.stats.finish_reason = "interrupted"
        if sequence in self.running:
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _leave(self, sequence: Sequence) -> None:
        if not sequence.begun:
            release(sequence, sequence.slot)
        elif sequence.request.drafter is not None:
            sequence.request.drafter.end(sequence)
        self._scheduler.leave(sequence)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        sequence.error = error
        self.abort(sequence)

    # --------------------------------------------------------------------------------------------------------- a step
    def _take(self, sequences: list[Sequence]) -> list[Emission]:
        """One step of running sequences."""
        clock = self._clock
        began = clock()
        written: dict[Sequence, list[Token]] = {}
        reading: list[Sequence] = []
        writing: list[Sequence] = []
        for sequence in sequences:
            (reading if sequence.reading else writing).append(sequence)
        turns = self._propose(writing) if writing else []
        joint: list[_Turn] = []
        parts: list[Part] = []
        for turn in turns:
            by_itself = turn.draft.fused is not None or turn.sequence.request.verification != "batched"
            if by_itself and self._verify_alone(turn):
                self._guarded(turn.sequence, self._decided, turn, None, written)
            elif not turn.draft.waits:
                turn.part = verification(turn.sequence, turn.draft, turn.taps)
                joint.append(turn)
                parts.append(turn.part)
        pieces = self._scheduler.pieces(reading, len(turns)) if reading else []
        parts += [self._prompt_part(sequence, rows) for sequence, rows in pieces]
        if parts:
            mark = clock()
            results = self._in_turns(parts, len(joint))
            verify_s = clock() - mark
            shared = self._shared(joint, pieces, verify_s) if len(sequences) > 1 else None
            for turn, result in zip(joint, results, strict=False):
                self._guarded(turn.sequence, self._decide, turn, result, verify_s, shared, written)
            for (sequence, rows), result in zip(pieces, results[len(joint) :], strict=True):
                self._guarded(sequence, self._read, sequence, rows, result, written)
        self._clocked(turns, reading, clock() - began)
        emissions = []
        for sequence in sequences:
            if sequence in written or sequence.finished:
                emissions.append(Emission(sequence, written.get(sequence, [])))
                if sequence.finished and sequence in self.running:
                    self._leave(sequence)
        return emissions

    def _in_turns(self, parts: list[Part], verified: int) -> list[Result | Exception]:
        """Compute all parts, the first so many with no more rows in a forward than the target has; prompts are read
        with the last of them."""
        turns = in_turns([len(part.rows.tokens) for part in parts[:verified]], self.target.limits.batch_rows) or [[]]
        turns[-1].extend(range(verified, len(parts)))
        return [result for turn in turns for result in compute_each(self.target, [parts[i] for i in turn])]

    def _guarded(self, sequence: Sequence, call: Callable[..., None], *arguments: object) -> None:
        """What goes wrong in this call is this sequence's error."""
        try:
            call(*arguments)
        except Exception as error:
            self._fail(sequence, error)

    @staticmethod
    def _clocked(turns: list[_Turn], reading: list[Sequence], spent: float) -> None:
        """All sequences of a step have waited for all of it."""
        for turn in turns:
            stats, prefill_s = turn.sequence.stats, turn.draft.prefill_s
            stats.decode_s += spent
            stats.draft_prefill_s += prefill_s
            if turn.draft.waits:
                turn.sequence.reading_s += prefill_s
            if turn.round is not None:
                turn.round.host_s = spent - turn.round.draft_s - turn.round.verify_s - prefill_s
        for sequence in reading:
            sequence.stats.ttft_s += spent

    # ---------------------------------------------------------------------------------------------------------- draft
    def _propose(self, sequences: list[Sequence]) -> list[_Turn]:
        """A round for each sequence: its draft, drafter by drafter. What goes wrong ends the sequence it happens to."""
        groups: dict[Drafter | None, list[Sequence]] = {}
        context = 0
        for sequence in sequences:
            sequence.wanted = 0
            context += len(sequence.tokens)
            if not sequence.begun:
                self._guarded(sequence, self._begin, sequence)
            if not sequence.finished:
                groups.setdefault(sequence.request.drafter, []).append(sequence)
        mark = self._clock()
        limits = self.target.limits
        rows = limits.rows if limits.batch_rows is None else min(limits.rows, limits.batch_rows)
        prompt_rows = self._scheduler.prompt_rows
        budget = Budget(rows, len(sequences), context, prompt_rows, limits.batch_rows, limits.vocabulary)
        drafts: dict[Sequence, Draft] = {}
        for drafter, members in groups.items():
            if drafter is None:
                drafts.update(dict.fromkeys(members, NO_DRAFT))
                continue
            for sequence, draft in zip(members, self._proposals(drafter, members, budget), strict=True):
                try:
                    if isinstance(draft, Exception):
                        raise draft
                    if not draft.checked:
                        check_draft(draft, sequence, budget)
                    drafts[sequence] = draft
                except Exception as error:
                    self._fail(sequence, error)
        draft_s = self._clock() - mark - sum(draft.prefill_s for draft in drafts.values())
        return [_Turn(sequence, drafts[sequence], draft_s) for sequence in sequences if sequence in drafts]

    @staticmethod
    def _proposals(drafter: Drafter, sequences: list[Sequence], budget: Budget) -> list[Draft | Exception]:
        try:
            return list(drafter.propose(sequences, budget))
        except Exception as error:
            if len(sequences) == 1:
                return [error]
        # Whose error it is shows when each is asked for alone, after the error's frames and their tensors are gone.
        return [each for one in sequences for each in Engine._proposals(drafter, [one], budget)]

    def _begin(self, sequence: Sequence) -> None:
        """What a sequence needs before its first round, and not before its first token."""
        sequence.begin()
        drafter = sequence.request.drafter
        if drafter is not None:
            drafter.begin(sequence)
            for features, position, rows in sequence.prompt_states:
                drafter.verified(sequence, features, range(rows), position)
        sequence.prompt_states.clear()

    # --------------------------------------------------------------------------------------------------------- verify
    def _verify_alone(self, turn: _Turn) -> bool:
        """Verify a round that takes forwards of its own, if it is one: fused, or token by token."""
        sequence = turn.sequence
        try:
            if turn.draft.fused is not None:
                mark = self._clock()
                turn.draft, turn.verified = run_fused(sequence, turn.draft, *turn.draft.fused)
                turn.draft_s += self._clock() - mark
            if turn.verified is None and sequence.request.verification == "sequential" and not turn.draft.waits:
                turn.verified = verify_sequentially(self.target, sequence, turn.draft, self._clock, turn.taps)
        except Exception as error:
            self._fail(sequence, error)
            return True
        return turn.verified is not None

    def _decide(
        self, turn: _Turn, result: Result | Exception, verify_s: float, shared: Joint | None, written: dict
    ) -> None:
        if isinstance(result, Exception):
            raise result
        assert turn.part is not None
        verified = decide(self.target, turn.sequence, turn.draft, turn.part, result, self._clock)
        turn.verified = verified._replace(seconds=verified.seconds + verify_s)
        self._decided(turn, shared, written)

    @staticmethod
    def _shared(turns: list[_Turn], pieces: list[tuple[Sequence, Rows]], verify_s: float) -> Joint:
        return Joint(
            sequences=len(turns),
            rows=sum(len(turn.part.rows.tokens) for turn in turns if turn.part is not None),
            context=sum(len(turn.sequence.tokens) for turn in turns),
            prompt_rows=sum(len(rows.tokens) for _, rows in pieces),
            verify_s=verify_s,
            drafting=0,
            draft_s=0.0,
            draft_steps=0,
        )

    def _decided(self, turn: _Turn, shared: Joint | None, written: dict[Sequence, list[Token]]) -> None:
        """Emit what a verification decided, and tell everybody."""
        sequence, draft, verified = turn.sequence, turn.draft, turn.verified
        if verified is None:  # it has failed
            return
        drafter = sequence.request.drafter
        sequence.cached = verified.cached
        for features, rows, position in verified.computed:
            assert drafter is not None  # whose taps they are
            drafter.verified(sequence, features, rows, position)
        accepted, drafted = len(verified.kept), len(draft.tokens)
        if shared is not None and drafted:
            seconds = turn.draft_s if draft.seconds is None else draft.seconds
            shared = shared._replace(drafting=draft.together, draft_s=seconds, draft_steps=draft.forwards)
        turn.round = round_ = Round(
            drafted,
            accepted,
            emitted=0,
            draft_s=turn.draft_s,
            verify_s=verified.seconds,
            source=draft.source,
            proposed=tuple(draft.tokens),
            parents=None if draft.parents is None else tuple(draft.parents),
            kept=tuple(verified.kept),
            path_probs=tuple(draft.path_probs),
            joint=shared,
        )
        last = "plain" if not drafted else "bonus" if accepted == round_.depth else "corrected"
        block = [Token(draft.tokens[i], "drafted") for i in verified.kept] + [Token(verified.next_id, last)]
        remaining = sequence.remaining
        written[sequence] = tokens = sequence.taken(block)
        round_.emitted = len(tokens)
        round_.cut = len(tokens) <= accepted or sequence.wanted > remaining - 1
        sequence.stats.rounds.append(round_)
        if reading_s := sequence.reading_s + draft.prefill_s:
            sequence.policy.read(draft.source, reading_s)
            sequence.reading_s = 0.0
        if drafted and drafter is not None:
            drafter.observe(sequence, accepted)
        sequence.policy.update(round_)

    # -------------------------------------------------------------------------------------------------------- prompts
    @staticmethod
    def _prompt_part(sequence: Sequence, rows: Rows) -> Part:
        """A piece of a prompt as a part of a forward; of the last one logits are wanted."""
        drafter = sequence.request.drafter
        ends = rows.position + len(rows.tokens) == len(sequence.request.prompt)
        return Part(rows, ends, drafter.taps if drafter is not None else ())

    def _read(self, sequence: Sequence, rows: Rows, result: Result | Exception, written: dict) -> None:
        """A piece of a prompt has been read: after the last one the first token is chosen."""
        if isinstance(result, Exception):
            raise result
        drafter, prompt = sequence.request.drafter, sequence.request.prompt
        sequence.cached = rows.position + len(rows.tokens)
        if drafter is not None and drafter.taps:
            sequence.prompt_states.append((result.features, rows.position, len(rows.tokens)))
        if sequence.cached == len(prompt):
            written[sequence] = sequence.taken([Token(first_token(sequence, result), "prefill")])


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
