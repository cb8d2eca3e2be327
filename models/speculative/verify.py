"""The target's side of a round: what a forward has to compute for a sequence, and what its result decides.

One forward serves any number of sequences: `verification` and the engine say what each of them needs (`Part`),
`compute` takes all parts at once, `decide` and `first_token` read one sequence's result.
"""

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
from models.speculative.model import IDS, Features, LanguageModel, Rows, Step, Trees, Want
from models.speculative.sampling import SamplingParams
from models.speculative.sequence import Sequence as TextSequence

Clock = Callable[[], float]


class Part(NamedTuple):
    """One sequence's share of a forward, and what will be read of it: logits or else ids, hidden states of layers."""

    rows: Rows
    logits: bool
    taps: tuple[int, ...] = ()


class Result(NamedTuple):
    """What a forward gave for one part: its place among the step's, and the ids of all of them, if they were wanted."""

    step: Step
    place: int
    all_ids: list[list[int]] | None

    @property
    def ids(self) -> list[int]:
        """The target's choice after each row."""
        return (self.step.ids() if self.all_ids is None else self.all_ids)[self.place]

    @property
    def logits(self) -> Tensor:
        """[n, V]"""
        return self.step.logits(self.place)

    @property
    def features(self) -> Features:
        """[n, taps x H]"""
        return self.step.features(self.place)


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


def compute(target: LanguageModel, parts: Sequence[Part]) -> list[Result]:
    """Compute all parts in one forward; in one for each set of layers, where hidden states of several are wanted.

    The device has done its work when this returns.
    """
    rows: list[Rows] = []
    taps: tuple[int, ...] = ()
    ids: list[list[int]] | None = None
    logits = 0  # parts that want them
    for part in parts:
        rows.append(part.rows)
        logits += part.logits
        if part.taps and part.taps != taps:
            if taps:
                return _by_layers(target, parts)
            taps = part.taps
    step = target.extend(rows, Want(logits > 0, taps) if taps or logits else IDS)
    if logits:
        step.logits(0)[-1, -1].item()  # waits for the device, whose time this is
    if logits < len(rows):
        ids = step.ids()
    return [Result(step, place, ids) for place in range(len(rows))]


def _by_layers(target: LanguageModel, parts: Sequence[Part]) -> list[Result]:
    """A forward for each set of layers; parts that want none go with the first."""
    sets = sorted({part.taps for part in parts if part.taps})
    results: dict[int, Result] = {}
    for layers in sets:
        mine = [i for i, part in enumerate(parts) if (part.taps or sets[0]) == layers]
        results.update(zip(mine, compute(target, [parts[i] for i in mine]), strict=True))
    return [results[i] for i in range(len(parts))]


def compute_each(target: LanguageModel, parts: Sequence[Part]) -> list[Result | Exception]:
    """As `compute`. If that fails, each part is computed by itself, so that an error is that of one sequence."""
    try:
        return list(compute(target, parts))
    except Exception as error:
        if len(parts) == 1:
            return [error]
    # Not while the error is held: its frames hold the tensors of a forward that may have run out of memory.
    return [result for part in parts for result in compute_each(target, [part])]


def first_token(sequence: TextSequence, result: Result) -> int:
    """Choose the token that follows the prompt.

    Raises NotFinite for logits that are not: looked at once a text, here, where it costs nothing.
    """
    params, logits = sequence.request.sampling, result.logits
    if not logits.max().isfinite():  # the largest is NaN where any is; masked logits may be -inf
        raise NotFinite(
            "the target's logits after the prompt are not finite: its weights are damaged, or its numbers too large "
            "for its data type"
        )
    _show(sequence, result, [-1])
    if params.greedy:
        return result.ids[-1]
    return sample(_Laws(logits, params)[-1], sequence.generator)


def verification(sequence: TextSequence, draft: Draft, taps: tuple[int, ...] = ()) -> Part:
    """The rows that check a draft, which may be empty: what the cache lacks of the text, and the draft.

    taps: layers whose hidden states are wanted of it.
    """
    again, parents = sequence.tokens[sequence.cached :], None
    if draft.parents is not None:
        last = len(again) - 1
        parents = [*range(-1, last), *(last + 1 + up for up in draft.parents)]
    rows = Rows(sequence.slot, [*again, *draft.tokens], sequence.cached, parents)
    return Part(rows, _needs_logits(sequence), taps)


def decide(
    target: LanguageModel, sequence: TextSequence, draft: Draft, part: Part, result: Result, clock: Clock
) -> Verified:
    """What the result of a verification says about its draft. Of a tree the accepted rows are kept in the cache."""
    params, position = sequence.request.sampling, part.rows.position
    last = len(part.rows.tokens) - len(draft.tokens) - 1
    if params.greedy:
        ids = result.ids[last:]
        if draft.parents is None:
            accepted, next_id = accept_greedy(draft.tokens, ids)
            kept = list(range(accepted))
        else:
            kept, next_id = accept_tree_greedy(draft.tokens, draft.parents, ids)
    else:
        p = _Laws(result.logits[last:], params)
        if draft.parents is None:
            accepted, next_id = accept_sampled(draft.tokens, p, draft.probs, sequence.generator)
            kept = list(range(accepted))
        else:
            kept, next_id = accept_tree_sampled(draft.tokens, draft.parents, p, draft.probs, sequence.generator)
    text = [*range(last + 1), *(last + 1 + i for i in kept)]
    _show(sequence, result, text[last:])
    computed = ((result.features, text, position),) if part.taps else ()
    if draft.parents is None:
        return Verified(kept, next_id, len(sequence.tokens) + len(kept), 0.0, computed)
    began = clock()
    held = _keep(target, sequence.slot, position, text)
    return Verified(kept, next_id, position + held, clock() - began, computed)


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

    def results() -> Iterator[Result]:
        nonlocal seconds
        for each in rows:
            began = clock()
            (result,) = compute(target, [Part(each, _needs_logits(sequence), taps)])
            seconds += clock() - began
            _show(sequence, result, [0])
            if taps:
                computed.append((result.features, [0], each.position))
            yield result

    if params.greedy:
        accepted, next_id = accept_greedy(draft.tokens, (result.ids[0] for result in results()))
    else:
        distributions = (_Laws(result.logits, params)[0] for result in results())
        accepted, next_id = accept_sampled(draft.tokens, distributions, draft.probs, sequence.generator)
    return Verified(list(range(accepted)), next_id, len(sequence.tokens) + accepted, seconds, tuple(computed))


def _needs_logits(sequence: TextSequence) -> bool:
    return not sequence.request.sampling.greedy or sequence.request.reader is not None


def _show(sequence: TextSequence, result: Result, rows: list[int]) -> None:
    """Hand the logits of these rows, which the next tokens are chosen from, to who wants to see them."""
    if sequence.request.reader is not None:
        sequence.request.reader.read(result.logits[rows])


class _Laws:
    """The target's distributions [V] after rows of logits [n, V]. Each is computed when it is asked for, as those
    behind a rejection are not."""

    def __init__(self, logits: Tensor, params: SamplingParams) -> None:
        self._logits, self._params = logits, params

    def __getitem__(self, row: int) -> Tensor:
        params = self._params
        return distribution(self._logits[row][None], params.temperature, params.top_k, params.top_p)[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self._logits)))


def _keep(target: LanguageModel, slot: int, position: int, rows: list[int]) -> int:
    """Make rows of a tree the sequence itself; how many of them the cache then holds."""
    model = target.slot(slot)
    if not isinstance(model, Trees):
        raise ValueError(f"{type(model).__name__} computes no trees: use a drafter of chains")
    return model.keep(position, rows)
