"""The loop: draft, verify, accept, emit. Plain decoding is the same loop without a drafter."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from models.errors import UserError
from models.speculative.acceptance import (
    accept_greedy,
    accept_sampled,
    accept_tree_greedy,
    accept_tree_sampled,
    distribution,
    sample,
)
from models.speculative.control.policy import Controller, FixedDraftLength
from models.speculative.drafters import Draft, Drafter, Limit
from models.speculative.model import LanguageModel
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats, Round

_NO_DRAFT = Draft([])


class Token(NamedTuple):
    """An emitted token and where it came from.

    origin: "prefill" (the first), "plain" (no draft), "drafted" (and accepted), "corrected" (the target's, in
    place of a rejected one) or "bonus" (the target's, after a draft accepted in full).
    """

    id: int
    origin: str


def generate(
    target: LanguageModel,
    drafter: Drafter | None,
    prompt: Sequence[int],
    *,
    sampling: SamplingParams | None = None,
    controller: Controller | None = None,
    max_new_tokens: int = 128,
    stop_ids: Collection[int] = (),
    verification: str = "batched",
    stats: GenerationStats | None = None,
) -> Iterator[Token]:
    """Yield the tokens that follow `prompt`, distributed as the target alone would have written them.

    1. Prefill: the target reads the prompt and gives the first token. The drafter is not called before that
       token has been handed out, so the time to first token is plain decoding's.
    2. Draft: the drafter proposes tokens, as many as the controller allows its source of drafts, at most
       max_rows - 1 and at most one less than may still be emitted.
    3. Verify: one target forward over the last token and the drafted ones, K+1 rows. It overwrites whatever an
       earlier rejection left in the cache, so nothing has to be rolled back. Of a tree the cache keeps the accepted
       rows; what it cannot keep is fed again with the next round.
    4. Accept: a prefix of the draft, or a path down the tree, and one token of the target's own after it.
    5. Emit, and go on with 2. Nothing follows a stop token, which is itself emitted.

    sampling: default greedy, which moves only ids. drafter None: every token is plain. controller: default
    FixedDraftLength(); unused without a drafter. Prompt and text together never exceed target.max_seq_len tokens
    (finish reason "context"; "length" if max_new_tokens is no larger). verification "sequential" feeds the target
    one token per forward up to the first rejection: equal text, slower, there to be compared. `stats`, a
    fresh one, is filled while tokens come; time the consumer holds a token is not counted.

    Raises UserError, at the call: an empty prompt, one that fills the context, a token outside the vocabulary,
    max_new_tokens < 1, an unknown verification.
    """
    room = target.max_seq_len - len(prompt)
    if len(prompt) == 0:
        raise UserError("the prompt is empty: give at least one token")
    if room < 1:
        raise UserError(
            f"prompt has {len(prompt)} tokens, context is {target.max_seq_len}: "
            f"shorten the prompt to {target.max_seq_len - 1} or load the model with a longer context"
        )
    if not 0 <= min(prompt) <= max(prompt) < target.vocab_size:
        raise UserError(
            f"prompt has token ids {min(prompt)} to {max(prompt)}, the target's vocabulary is {target.vocab_size}: "
            "use the tokenizer of the target"
        )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: must be at least 1")
    if verification not in ("batched", "sequential"):
        raise UserError(f"verification {verification!r}: must be 'batched' or 'sequential'")
    stats = GenerationStats() if stats is None else stats
    stats.prompt_tokens = len(prompt)
    verifier = _Verifier(target, sampling or SamplingParams(), sequential=verification == "sequential")
    limit, limit_reason = (max_new_tokens, "length") if max_new_tokens <= room else (room, "context")
    if drafter is None:
        controller = FixedDraftLength(0)
    elif controller is None:
        controller = FixedDraftLength()
    return _decode(verifier, drafter, list(prompt), controller, limit, limit_reason, frozenset(stop_ids), stats)


def _decode(
    verifier: "_Verifier",
    drafter: Drafter | None,
    tokens: list[int],  # prompt and emitted; the target's cache holds all but the last
    controller: Controller,
    limit: int,
    limit_reason: str,
    stop_ids: frozenset[int],
    stats: GenerationStats,
) -> Iterator[Token]:
    clock = time.perf_counter
    remaining = wanted = 0

    def allowed(source: str) -> int:
        nonlocal wanted
        wanted = controller.draft_length(source)
        return min(wanted, remaining - 1, ask.rows)

    ask = Limit(allowed, controller.pays)
    try:
        mark = clock()
        first = verifier.first(tokens)
        tokens.append(first)
        stats.tokens = 1
        stats.finish_reason = "stop" if first in stop_ids else limit_reason if limit == 1 else ""
        stats.ttft_s = clock() - mark
        yield Token(first, "prefill")
        mark = clock()
        controller.begin(len(tokens) - 1, limit)

        while not stats.finish_reason:
            remaining, wanted = limit - stats.tokens, 0
            draft, draft_s = _NO_DRAFT, 0.0
            if drafter is not None:
                ask.rows = verifier.max_draft(tokens)
                began = clock()
                draft = drafter.propose(tokens, ask)
                draft_s = clock() - began
            drafted = len(draft.tokens)
            kept, next_id, verify_s = verifier(tokens, draft)
            accepted = len(kept)

            block = [*(draft.tokens[i] for i in kept), next_id]
            if not stop_ids.isdisjoint(block):
                block = block[: next(i for i, token in enumerate(block, 1) if token in stop_ids)]
            reason = "stop" if block[-1] in stop_ids else limit_reason if len(block) == remaining else ""

            cut = len(block) <= accepted or wanted > remaining - 1
            round = Round(
                drafted,
                accepted,
                len(block),
                draft_s - draft.prefill_s,
                verify_s,
                cut=cut,
                source=draft.source,
                proposed=tuple(draft.tokens),
                parents=draft.parents and tuple(draft.parents),
                kept=tuple(kept),
                reach=tuple(draft.reach),
            )
            last_origin = "plain" if not drafted else "bonus" if accepted == round.depth else "corrected"
            stats.rounds.append(round)
            if draft.prefill_s:
                stats.draft_prefill_s += draft.prefill_s
                controller.read(draft.source, draft.prefill_s)
            if drafted:
                drafter.observe(accepted)
            controller.update(round)
            forwards = draft_s + verify_s  # the rest of the time since `mark` is the host's
            stats.decode_s += forwards
            mark += forwards

            for sent, token in enumerate(block, 1):
                tokens.append(token)
                stats.tokens += 1
                if sent == len(block):
                    stats.finish_reason = reason
                spent = clock() - mark
                round.host_s += spent
                stats.decode_s += spent
                yield Token(token, "drafted" if sent <= accepted else last_origin)
                mark = clock()
    finally:
        if not stats.finish_reason:  # closed by the consumer, or an error on its way out
            stats.finish_reason = "interrupted"
            unsent = 1 + sum(round.emitted for round in stats.rounds) - stats.tokens
            if stats.rounds and unsent:
                stats.rounds[-1].emitted -= unsent
                stats.rounds[-1].cut = True


class _Verifier:
    """The target's side of a round: checks a draft against the target and times the forwards it takes."""

    def __init__(self, target: LanguageModel, sampling: SamplingParams, sequential: bool) -> None:
        self._target = target
        self._sampling = sampling
        self._sequential = sequential
        self._generator = sampling.generator("target")
        self._seconds = 0.0
        self._cached = 0  # leading tokens that the target's cache holds

    def max_draft(self, tokens: list[int]) -> int:
        """Rows that a verification has left for drafted tokens."""
        return self._target.max_rows - (len(tokens) - self._cached)

    def first(self, prompt: list[int]) -> int:
        """Prefill and choose the first token."""
        logits = self._target.prefill(prompt)
        self._cached = len(prompt)
        if self._sampling.greedy:
            return int(logits.argmax())
        return sample(self._distribution(logits[None])[0], self._generator)

    def __call__(self, tokens: list[int], draft: Draft) -> tuple[Sequence[int], int, float]:
        """(indices of the accepted tokens, the target's id after them, seconds inside the target; none if the draft
        came verified)."""
        if draft.verified and self._sampling.greedy and not self._sequential:
            accepted, next_id = draft.verified
            self._cached = len(tokens) + accepted
            return range(accepted), next_id, 0.0
        self._seconds = 0.0
        kept, next_id = (self._chain if draft.parents is None else self._tree)(tokens, draft)
        return kept, next_id, self._seconds

    def _chain(self, tokens: list[int], draft: Draft) -> tuple[Sequence[int], int]:
        again, position = tokens[self._cached :], self._cached  # the last token, and what the cache could not keep
        block, last = again + draft.tokens, len(again) - 1
        if self._sequential:
            rows = _OnDemand(lambda i: self._rows(block[i : i + 1], position + i)[0])
        else:
            rows = self._rows(block, position)[last:]
        if self._sampling.greedy:
            accepted, next_id = accept_greedy(draft.tokens, rows)
        else:
            accepted, next_id = accept_sampled(draft.tokens, rows, draft.probs, self._generator)
        self._cached = len(tokens) + accepted
        return range(accepted), next_id

    def _tree(self, tokens: list[int], draft: Draft) -> tuple[Sequence[int], int]:
        again, position = tokens[self._cached :], self._cached
        last = len(again) - 1
        parents = [*range(-1, last), *(last + 1 + up for up in draft.parents)]
        rows = self._rows(again + draft.tokens, position, parents)[last:]
        if self._sampling.greedy:
            kept, next_id = accept_tree_greedy(draft.tokens, draft.parents, rows)
        else:
            kept, next_id = accept_tree_sampled(draft.tokens, draft.parents, rows, draft.probs, self._generator)
        began = time.perf_counter()
        held = self._target.keep(position, [*range(last + 1), *(last + 1 + i for i in kept)])
        self._seconds += time.perf_counter() - began
        self._cached = position + held
        return kept, next_id

    def _rows(self, block: list[int], position: int, parents: list[int] | None = None):
        """What the target says after each token of the block: ids[n] when greedy, else probabilities[n, V]."""
        greedy = self._sampling.greedy
        began = time.perf_counter()
        forward = self._target.greedy if greedy else self._target.forward
        rows = forward(block, position) if parents is None else forward(block, position, parents)
        if not greedy:
            rows[-1, -1].item()  # waits for the device, whose time this is
        self._seconds += time.perf_counter() - began
        return rows if greedy else self._distribution(rows)

    def _distribution(self, logits):
        return distribution(logits, self._sampling.temperature, self._sampling.top_k, self._sampling.top_p)


class _OnDemand:
    """A sequence whose items are computed when asked for."""

    def __init__(self, item: Callable[[int], object]) -> None:
        self._item = item

    def __getitem__(self, i: int):
        return self._item(i)
