"""The target's side of a round: checks a sequence's draft in one forward, or token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from models.errors import NotFinite
from models.speculative.acceptance import (
    accept_greedy,
    accept_sampled,
    accept_tree_greedy,
    accept_tree_sampled,
    distribution,
    sample,
)
from models.speculative.drafters import Draft
from models.speculative.model import IDS, LOGITS, Features, LanguageModel, Rows, Step, Trees, Want
from models.speculative.sampling import SamplingParams
from models.speculative.sequence import Sequence as TextSequence

Clock = Callable[[], float]


class Verified(NamedTuple):
    """What a verification decided.

    kept: indices of the accepted tokens of the draft. next_id: the target's own token after them. cached: leading
    tokens that the target's cache then holds, those just kept included. seconds: inside the target. computed: hidden
    states that were wanted, each with the rows of it that belong to the text and the position of the first.
    """

    kept: list[int]
    next_id: int
    cached: int
    seconds: float
    computed: tuple[tuple[Features, Sequence[int], int], ...] = ()


def first_token(sequence: TextSequence, step: Step) -> int:
    """Choose the token that follows the prompt.

    Raises NotFinite for logits that are not: looked at once a text, here, where it costs nothing.
    """
    params, logits = sequence.request.sampling, step.logits(0)
    if not logits.max().isfinite():  # the largest is NaN where any is; masked logits may be -inf
        raise NotFinite(
            "the target's logits after the prompt are not finite: its weights are damaged, or its numbers too large "
            "for its data type"
        )
    _show(sequence, logits[-1:])
    if params.greedy:
        return step.ids()[0][-1]
    return sample(_distribution(logits, params)[0], sequence.generator)


def verify(
    target: LanguageModel,
    sequence: TextSequence,
    draft: Draft,
    clock: Clock = time.perf_counter,
    taps: tuple[int, ...] = (),
) -> Verified:
    """Check a draft, which may be empty, in one forward over it and what the cache lacks of the text.

    taps: layers whose hidden states are wanted of it.
    """
    again, position = sequence.tokens[sequence.cached :], sequence.cached
    last, parents = len(again) - 1, None
    if draft.parents is not None:
        parents = [*range(-1, last), *(last + 1 + up for up in draft.parents)]
    rows = Rows(sequence.slot, [*again, *draft.tokens], position, parents)
    reader = sequence.request.reader
    if sequence.request.sampling.greedy:
        ids, step, seconds = _ids(target, rows, clock, taps, logits=reader is not None)
        if draft.parents is None:
            accepted, next_id = accept_greedy(draft.tokens, ids[last:])
            kept = list(range(accepted))
        else:
            kept, next_id = accept_tree_greedy(draft.tokens, draft.parents, ids[last:])
    else:
        p, step, seconds = _distributions(target, rows, sequence.request.sampling, clock, taps)
        if draft.parents is None:
            accepted, next_id = accept_sampled(draft.tokens, p[last:], draft.probs, sequence.generator)
            kept = list(range(accepted))
        else:
            kept, next_id = accept_tree_sampled(draft.tokens, draft.parents, p[last:], draft.probs, sequence.generator)
    text = [*range(last + 1), *(last + 1 + i for i in kept)]
    if reader is not None:
        _show(sequence, step.logits(0)[text[last:]])
    computed = ((step.features(0), text, position),) if taps else ()
    if draft.parents is None:
        return Verified(kept, next_id, len(sequence.tokens) + len(kept), seconds, computed)
    began = clock()
    held = _keep(target, sequence.slot, position, text)
    return Verified(kept, next_id, position + held, seconds + clock() - began, computed)


def verify_sequentially(
    target: LanguageModel,
    sequence: TextSequence,
    draft: Draft,
    clock: Clock = time.perf_counter,
    taps: tuple[int, ...] = (),
) -> Verified:
    """Check a draft one token a forward, up to the first rejection: what batched verification is compared with."""
    params, seconds = sequence.request.sampling, 0.0
    computed: list[tuple[Features, Sequence[int], int]] = []
    rows = [
        Rows(sequence.slot, [token], position)
        for position, token in enumerate([sequence.tokens[-1], *draft.tokens], len(sequence.tokens) - 1)
    ]

    def ids() -> Iterator[int]:
        nonlocal seconds
        for each in rows:
            (choice,), step, spent = _ids(target, each, clock, taps, logits=sequence.request.reader is not None)
            seconds += spent
            if sequence.request.reader is not None:
                _show(sequence, step.logits(0))
            if taps:
                computed.append((step.features(0), [0], each.position))
            yield choice

    def distributions() -> Iterator[Tensor]:
        nonlocal seconds
        for each in rows:
            p, step, spent = _distributions(target, each, params, clock, taps)
            seconds += spent
            if sequence.request.reader is not None:
                _show(sequence, step.logits(0))
            if taps:
                computed.append((step.features(0), [0], each.position))
            yield p[0]

    if params.greedy:
        accepted, next_id = accept_greedy(draft.tokens, ids())
    else:
        accepted, next_id = accept_sampled(draft.tokens, distributions(), draft.probs, sequence.generator)
    return Verified(list(range(accepted)), next_id, len(sequence.tokens) + accepted, seconds, tuple(computed))


def _show(sequence: TextSequence, logits: Tensor) -> None:
    """Hand the logits [m, V] of the next m tokens to who wants to see them."""
    if sequence.request.reader is not None:
        sequence.request.reader.read(logits)


def _ids(
    target: LanguageModel, rows: Rows, clock: Clock, taps: tuple[int, ...], *, logits: bool = False
) -> tuple[list[int], Step, float]:
    """(the target's choice after each of the rows, the step, seconds). logits: the step has them too."""
    began = clock()
    step = target.extend([rows], Want(logits, taps) if taps or logits else IDS)
    ids = step.ids()[0]
    return ids, step, clock() - began


def _distributions(
    target: LanguageModel, rows: Rows, params: SamplingParams, clock: Clock, taps: tuple[int, ...]
) -> tuple[Tensor, Step, float]:
    """(the target's probabilities [n, V] after each of the rows, the step, seconds of the forward)."""
    began = clock()
    step = target.extend([rows], Want(logits=True, taps=taps) if taps else LOGITS)
    logits = step.logits(0)
    logits[-1, -1].item()  # waits for the device, whose time this is
    seconds = clock() - began
    return _distribution(logits, params), step, seconds


def _distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    return distribution(logits, params.temperature, params.top_k, params.top_p)


def _keep(target: LanguageModel, slot: int, position: int, rows: list[int]) -> int:
    """Make rows of a tree the sequence itself; how many of them the cache then holds."""
    model = target.slot(slot)
    if not isinstance(model, Trees):
        raise ValueError(f"{type(model).__name__} computes no trees: use a drafter of chains")
    return model.keep(position, rows)
