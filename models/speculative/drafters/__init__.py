"""Ways to guess the next tokens, one file each. A drafter can make text faster, never different."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from models.speculative.tree import tree_levels

if TYPE_CHECKING:  # command lines import this and answer at once
    from torch import Tensor

    from models.speculative.model import Features, FusedRounds
    from models.speculative.sequence import Sequence

MAX_DRAFT_LENGTH = 31  # with the token before them, drafted tokens fill one tile of 32 rows


def always(source: str, path_prob: float, steps: int, rows: int) -> bool:
    """A `Limit.pays` that names no price."""
    return True


class Limit:
    """What the loop allows in this round. limit(source) is asked once per round by the source that drafts.

    Calling it gives the longest chain of tokens that a source ("model", "lookup", ..) may propose now; 0: none.
    `pays(source, path_prob, steps, rows)` is for a drafter that knows its own probabilities: whether it is worth while
    to verify a token as row `rows` (counted from 1, the text's last token being row 1), where `path_prob` is the
    draft's probability of the token and all before it; with steps = 1 the token is still to be drafted, by one more
    step, and it is that of those before it. Not `priced`: everything does, and probabilities need not be found out.
    `pays_from(source, steps, rows)`: the path probability from which `pays` says so; None: it can only be asked.
    `rows`: drafted tokens that the verification has room for; a tree may have more of them than levels.
    """

    def __init__(
        self,
        length: Callable[[str], int],
        pays: Callable[[str, float, int, int], bool] = always,
        rows: int = MAX_DRAFT_LENGTH,
        pays_from: Callable[[str, int, int], float] | None = None,
    ) -> None:
        self._length = length
        self.pays, self.pays_from = pays, pays_from
        self.priced = pays is not always
        self.rows = rows

    def __call__(self, source: str) -> int:
        return self._length(source)


class Draft(NamedTuple):
    """Proposed continuation, at most as long as asked for; empty means that the next token is decoded plainly.

    probs [k, V]: the distribution each token was drawn from (temperature, top-k and top-p applied); None when tokens
    were chosen deterministically. Seconds spent on reading the prompt, and later what was emitted without this
    drafter, go into prefill_s.
    source: what drafted, for costs and acceptance of their own.
    parents: of a tree, the index of each token's parent among the tokens, -1 for those that follow the text; parents
    come first. A token's distribution is then without its earlier siblings: they are drawn without replacement.
    None: a chain.
    path_probs: the draft's own probability of each token and all before it, where it is known; one number more than
    tokens if one was looked at and not proposed. fused: instead of tokens, a greedy round to run that drafts and
    verifies k of them: (rounds, k).
    together: for how many sequences the forwards were that drafted it, 0 if it had its own; forwards: their number;
    seconds: that drafting for all of them took, prompts apart; None: what the call took. waits: nothing yet, the
    drafter is still reading the prompt; the sequence has no round in this step. checked: `check_draft` has passed it.
    """

    tokens: list[int]
    probs: Tensor | None = None
    prefill_s: float = 0.0
    source: str = "model"
    parents: list[int] | None = None
    path_probs: Items[float] = ()
    fused: tuple[FusedRounds, int] | None = None
    together: int = 0
    forwards: int = 0
    seconds: float | None = None
    waits: bool = False
    checked: bool = False


class SequenceDrafter(Protocol):
    """Drafts for one text: one object per text, `propose` and `observe` in turn.

    Sampling stays lossless only if whether position i is proposed does not depend on the token drawn for i: a
    drafter that stops early may look at the distribution of i or at earlier tokens, and keeps what it has drawn. In a
    tree the same holds for the number of children of a token, which are tried in their order.
    """

    def propose(self, tokens: list[int], limit: Limit) -> Draft:
        """Up to limit(source) tokens to follow `tokens`: the prompt and everything emitted. Not to be changed or kept.

        Between two calls the text may have grown by any number of tokens, also by ones never proposed.
        """
        ...

    def observe(self, accepted: int) -> None:
        """How many of the tokens last proposed were kept; not called when none were proposed."""
        ...


@runtime_checkable
class ReadsStates(Protocol):
    """A `SequenceDrafter` that reads the target's hidden states after some layers, its taps; () for none after all."""

    @property
    def taps(self) -> tuple[int, ...]:
        """As of `model.Want`."""
        ...

    def states(self, features: Features, rows: Items[int], position: int) -> None:
        """The target has computed rows of the text, whoever drafted them: see `model.DraftHead.states`."""
        ...

    def settle(self, tokens: list[int]) -> float:
        """Somebody else drafts this round: read now what would be gone after it. Returns seconds."""
        ...


class Budget(NamedTuple):
    """What a step may draft.

    rows: of one sequence in a target's forward, the tokens before the drafted ones included. sequences: that share the
    step. context: tokens of all their texts. prompt_rows: that drafters may read of texts, all together, where several
    share the step. batch_rows: as of `model.Limits`: policies that choose how much is drafted keep to what fits one
    forward of all; for others texts take turns. vocabulary: the target's; None: not known.
    """

    rows: int
    sequences: int = 1
    context: int = 0
    prompt_rows: int = 512
    batch_rows: int | None = None
    vocabulary: int | None = None

    def share(self, sequence: Sequence) -> Limit:
        """What is allowed to one sequence, by its policy, its end, and the rows that the text itself leaves."""
        policy, rows = sequence.policy, self.rows
        if self.batch_rows is not None and policy.fits_forward:
            rows = min(rows, self.batch_rows // self.sequences)
        rows = max(0, rows - (len(sequence.tokens) - sequence.cached))
        policy.shares(self.sequences, self.context)

        def length(source: str) -> int:
            sequence.wanted = policy.draft_length(source)
            return min(sequence.wanted, sequence.remaining - 1, rows)

        return Limit(length, policy.pays, rows, policy.pays_from)


def check_draft(draft: Draft, sequence: Sequence, budget: Budget) -> None:
    """Raise ValueError for a draft that cannot be verified, or would not keep the target's distribution.

    Looked at: ids, how many there are, the shape of a tree, shape and finiteness of probabilities.
    """
    tokens, probs, parents = draft.tokens, draft.probs, draft.parents
    if not tokens:
        return
    if budget.vocabulary is not None and not 0 <= min(tokens) <= max(tokens) < budget.vocabulary:
        wrong = next(token for token in tokens if not 0 <= token < budget.vocabulary)
        raise ValueError(f"drafted id {wrong} is outside the target's vocabulary of {budget.vocabulary}")
    if parents is not None and (
        len(parents) != len(tokens) or not all(-1 <= parent < i for i, parent in enumerate(parents))
    ):
        raise ValueError(f"{len(tokens)} drafted tokens with parents {list(parents)} are no tree")
    depth = len(tokens) if parents is None else tree_levels(parents)
    rows = budget.rows - (len(sequence.tokens) - sequence.cached)
    if len(tokens) > rows or depth > sequence.remaining - 1:
        raise ValueError(
            f"{len(tokens)} drafted tokens, {depth} one after the other: {rows} rows and "
            f"{sequence.remaining - 1} tokens are left"
        )
    if probs is not None:
        if probs.ndim != 2 or len(probs) != len(tokens) or probs.shape[1] != (budget.vocabulary or probs.shape[1]):
            raise ValueError(
                f"probabilities of shape {list(probs.shape)} for {len(tokens)} drafted tokens and a vocabulary of "
                f"{budget.vocabulary}"
            )
        if not probs.isfinite().all():
            raise ValueError("the draft's probabilities are not finite")


class Drafter(Protocol):
    """What the engine asks of a drafter, which may draft for several sequences at once.

    taps: layers of the target whose hidden states it needs, as of `model.Want`; usually none.
    """

    taps: tuple[int, ...]

    def begin(self, sequence: Sequence) -> None:
        """A sequence has its first token."""
        ...

    def propose(self, sequences: Items[Sequence], budget: Budget) -> Items[Draft | Exception]:
        """A draft for each of them, in their order; see `SequenceDrafter`. An error that is one sequence's own stands
        in the place of its draft; one that is raised while several are asked for makes the engine ask one by one."""
        ...

    def verified(self, sequence: Sequence, features: Features, rows: Items[int], position: int) -> None:
        """The target has computed rows of a sequence's text; called for the prompt, in pieces, and after every round
        if there are `taps`."""
        ...

    def observe(self, sequence: Sequence, accepted: int) -> None:
        """How many of the tokens last proposed for a sequence were kept; not called when none were proposed."""
        ...

    def end(self, sequence: Sequence) -> None:
        """A sequence that has begun is over."""
        ...


@runtime_checkable
class HoldsBeginnings(Protocol):
    """A `Drafter` with taps that may hold what it made of the beginning of a prompt: the target need not compute that
    beginning for its states."""

    def hold(self, sequence: Sequence, slot: int) -> int:
        """A sequence may start in a slot: of how many leading tokens the states are not needed. It may be given them.

        `release` follows, or `begin` with the target's own number in `stats.reused_tokens`, at most this one.
        """
        ...

    def release(self, slot: int) -> None:
        """The sequence that was to have the slot does not begin."""
        ...


class PerSequence:
    """A `Drafter` made of one `SequenceDrafter` for each sequence.

    Args:
        make: called when a sequence begins.
        taps: layers of the target whose hidden states they read; they are then `ReadsStates`.
        free: called with the slot of a sequence that is over: what a draft model holds there is not needed any more.
    """

    def __init__(
        self,
        make: Callable[[Sequence], SequenceDrafter],
        taps: tuple[int, ...] = (),
        free: Callable[[int], None] = lambda slot: None,
    ) -> None:
        self.taps = taps
        self._make = make
        self._free = free
        self._of: dict[Sequence, SequenceDrafter] = {}

    def begin(self, sequence: Sequence) -> None:
        """Make the sequence's drafter."""
        self._of[sequence] = self._make(sequence)

    def verified(self, sequence: Sequence, features: Features, rows: Items[int], position: int) -> None:
        """Hand the states to the sequence's drafter."""
        drafter = self._of[sequence]
        assert isinstance(drafter, ReadsStates)  # as `taps` says
        drafter.states(features, rows, position)

    def propose(self, sequences: Items[Sequence], budget: Budget) -> Items[Draft | Exception]:
        """One after the other, each with its own time where there are several."""
        if len(sequences) == 1:
            return [self.of(sequences[0]).propose(sequences[0].tokens, budget.share(sequences[0]))]
        return [self._timed(each, budget.share(each)) for each in sequences]

    def of(self, sequence: Sequence) -> SequenceDrafter:
        """The drafter of a sequence that has begun."""
        return self._of[sequence]

    def observe(self, sequence: Sequence, accepted: int) -> None:
        """Tell the sequence's drafter."""
        self._of[sequence].observe(accepted)

    def end(self, sequence: Sequence) -> None:
        """Forget the sequence's drafter, if there is one: making it may have been interrupted."""
        self._of.pop(sequence, None)
        self._free(sequence.slot)

    def _timed(self, sequence: Sequence, limit: Limit) -> Draft | Exception:
        began = time.perf_counter()
        try:
            draft = self._of[sequence].propose(sequence.tokens, limit)
            return draft._replace(seconds=time.perf_counter() - began - draft.prefill_s)
        except Exception as error:
            return error


class OneText(PerSequence):
    """A `SequenceDrafter` as a `Drafter` of one sequence."""

    def __init__(self, drafter: SequenceDrafter) -> None:
        super().__init__(lambda sequence: drafter, drafter.taps if isinstance(drafter, ReadsStates) else ())
