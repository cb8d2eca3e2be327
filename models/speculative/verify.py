"""The target's side of a round: checks a sequence's draft in one forward, or token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
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
from models.speculative.model import IDS, LOGITS, LanguageModel, Rows, Step
from models.speculative.sampling import SamplingParams
from models.speculative.sequence import Sequence

Clock = Callable[[], float]


class Verified(NamedTuple):
    """What a verification decided.

    kept: indices of the accepted tokens of the draft. next_id: the target's own token after them. cached: leading
    tokens that the target's cache then holds, those just kept included. seconds: inside the target.
    """

    kept: list[int]
    next_id: int
    cached: int
    seconds: float


def first_token(sequence: Sequence, step: Step) -> int:
    """Choose the token that follows the prompt.

    Raises NotFinite for logits that are not: looked at once a text, here, where it costs nothing.
    """
    params, logits = sequence.request.sampling, step.logits(0)
    if not torch.isfinite(logits).all():
        raise NotFinite(
            "the target's logits after the prompt are not finite: its weights are damaged, or its numbers too large "
            "for its data type"
        )
    if params.greedy:
        return int(logits.argmax())
    return sample(_distribution(logits, params)[0], sequence.generator)


def verify(target: LanguageModel, sequence: Sequence, draft: Draft, clock: Clock = time.perf_counter) -> Verified:
    """Check a draft, which may be empty, in one forward over it and what the cache lacks of the text."""
    again, position = sequence.tokens[sequence.cached :], sequence.cached
    last, parents = len(again) - 1, None
    if draft.parents is not None:
        parents = [*range(-1, last), *(last + 1 + up for up in draft.parents)]
    rows, seconds = _rows(target, sequence, [*again, *draft.tokens], position, parents, clock)
    rows, greedy = rows[last:], sequence.request.sampling.greedy
    if draft.parents is None:
        if greedy:
            accepted, next_id = accept_greedy(draft.tokens, rows)
        else:
            accepted, next_id = accept_sampled(draft.tokens, rows, draft.probs, sequence.generator)
        return Verified(list(range(accepted)), next_id, len(sequence.tokens) + accepted, seconds)
    if greedy:
        kept, next_id = accept_tree_greedy(draft.tokens, draft.parents, rows)
    else:
        kept, next_id = accept_tree_sampled(draft.tokens, draft.parents, rows, draft.probs, sequence.generator)
    began = clock()
    path = [*range(last + 1), *(last + 1 + i for i in kept)]
    held = target.slot(sequence.slot).keep(position, path)
    return Verified(kept, next_id, position + held, seconds + clock() - began)


def verify_sequentially(
    target: LanguageModel, sequence: Sequence, draft: Draft, clock: Clock = time.perf_counter
) -> Verified:
    """Check a draft one token a forward, up to the first rejection: what batched verification is compared with."""
    position, seconds = len(sequence.tokens) - 1, 0.0
    block = [sequence.tokens[-1], *draft.tokens]

    def row(i: int) -> int | Tensor:
        nonlocal seconds
        rows, spent = _rows(target, sequence, block[i : i + 1], position + i, None, clock)
        seconds += spent
        return rows[0]

    rows = _OnDemand(row)
    if sequence.request.sampling.greedy:
        accepted, next_id = accept_greedy(draft.tokens, rows)
    else:
        accepted, next_id = accept_sampled(draft.tokens, rows, draft.probs, sequence.generator)
    return Verified(list(range(accepted)), next_id, len(sequence.tokens) + accepted, seconds)


def _rows(
    target: LanguageModel,
    sequence: Sequence,
    block: list[int],
    position: int,
    parents: list[int] | None,
    clock: Clock,
) -> tuple[list[int] | Tensor, float]:
    """(what the target says after each token of the block: ids [n] when greedy, else probabilities [n, V]; seconds)."""
    params = sequence.request.sampling
    began = clock()
    step = target.extend([Rows(sequence.slot, block, position, parents)], IDS if params.greedy else LOGITS)
    if params.greedy:
        rows = step.ids()[0]
        return rows, clock() - began
    logits = step.logits(0)
    logits[-1, -1].item()  # waits for the device, whose time this is
    seconds = clock() - began
    return _distribution(logits, params), seconds


def _distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    return distribution(logits, params.temperature, params.top_k, params.top_p)


class _OnDemand:
    """A sequence whose items are computed when asked for."""

    def __init__(self, item: Callable[[int], object]) -> None:
        self._item = item

    def __getitem__(self, i: int):
        return self._item(i)
