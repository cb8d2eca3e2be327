"""What the engine asks of a network.

`LanguageModel` is what every target and every draft model fulfils: one call, `extend`, computes rows of any number of
sequences. `SequenceModel` is one slot of it, seen as a model of one sequence: what drafters work with. What only some
networks can do has protocols of its own: `Chains`, `ChainsWhile`, `Trees`, `EarlyExit`, `Tapped`, `DraftHead`, `Paged`,
`FusedRounds`.

Addresses are absolute: a call that is given n tokens and a position writes the cache at position .. position+n-1 and
attends to everything before. Rollback needs no call: pass the position to go on from; what lies beyond it is stale,
never attended to, and overwritten in time.

Quick to import: torch is imported when something is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

from models.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Rows(NamedTuple):
    """One sequence's share of a forward: n tokens at position .. position+n-1 of a slot.

    n = 1 is decoding, n = K+1 is verification, a whole prompt (or a piece of one) is prefill.

    parents makes it a tree, whose rows lie in the cache at position, position+1, .. while each stands one behind its
    parent: the row of every token's parent, -1 for row 0. Tokens are the last n rows; those before them are in the
    cache from earlier calls.

    last: only the result of the last row is wanted, as after a prompt; there may then be any number of rows.
    """

    slot: int
    tokens: Sequence[int]
    position: int
    parents: Sequence[int] | None = None
    last: bool = False


class Want(NamedTuple):
    """What a caller will read of a step.

    logits: logits; else ids of the greatest logits, so that only ids have to leave the device.
    taps: layers after which the hidden states are kept: 0 is the embedding, i the output of the i-th layer.
    """

    logits: bool = False
    taps: tuple[int, ...] = ()


IDS, LOGITS = Want(), Want(logits=True)


class Limits(NamedTuple):
    """How much a model can hold and compute."""

    rows: int  # of one sequence in a forward, prompts apart
    slots: int  # sequences
    positions: int  # of each sequence
    vocabulary: int
    pool: int | None = None  # positions of all sequences together, where they share them; None: each has its own
    batch_rows: int | None = None  # of all sequences together in a forward, prompts apart; None: any number


def in_turns(counts: Sequence[int], most: int | None) -> list[list[int]]:
    """Which sequences, that have so many rows each, share a forward of at most so many: their numbers, in their order.

    One that has more by itself has a turn of its own. Without a bound all share one.
    """
    turns: list[list[int]] = []
    room = 0
    for number, count in enumerate(counts):
        if not turns or (most is not None and count > room):
            turns.append([])
            room = most or 0
        turns[-1].append(number)
        room -= count
    return turns


@dataclass(frozen=True)
class Workload:
    """What forwards drafting asks of models beside plain decoding, so that programs can be prepared for them.

    Args:
        drafts_with: "draft" (a draft model), "head" (a draft head), "first-layers" (of the target) or "" (no forward).
        tree: whether drafts are trees.
        fusible: whether a greedy round may be one program.
        mixed: whether there are drafts that come from no model too, to be verified by themselves.
    """

    drafts_with: Literal["", "draft", "head", "first-layers"] = ""
    tree: bool = False
    fusible: bool = False
    mixed: bool = False


Chooser: TypeAlias = "Callable[[Tensor], list[int]]"  # logits [n, V] -> n ids
# Hidden states [n, taps x H] of a forward's rows, on the model's device: a torch tensor, or on a board its own kind.
Features: TypeAlias = Any


class Step:
    """What a forward gave, by the order of its `Rows`. The device's work may still be under way: reading waits for it.

    Args:
        results: for each sequence logits [n, V] or, where only ids were wanted, n ids.
        features: for each sequence the hidden states [n, taps x H] that were wanted, those of one layer after another.
        choosers: for each sequence what makes ids of its logits; none: argmax.
    """

    def __init__(
        self,
        results: Sequence[list[int] | Tensor],
        features: Sequence[Features] = (),
        choosers: Sequence[Chooser] = (),
    ) -> None:
        self._results = results
        self._features = features
        self._choosers = choosers or [_argmax] * len(results)

    def ids(self) -> list[list[int]]:
        """The id of the greatest logit of each row, by sequence; of equal ones, as the model decides or the lowest."""
        return [
            each if isinstance(each, list) else choose(each)
            for each, choose in zip(self._results, self._choosers, strict=True)
        ]

    def logits(self, i: int) -> Tensor:
        """Logits [n, V] of sequence i, of any floating type, on the model's device. Only if they were wanted."""
        result = self._results[i]
        if isinstance(result, list):
            raise ValueError("these rows were computed for their ids alone: ask for logits")
        return result

    def features(self, i: int) -> Features:
        """Hidden states [n, taps x H] of sequence i, on the model's device. Only if taps were wanted.

        Of all n rows, also where the logits of the last one alone were wanted.
        """
        if not self._features:
            raise ValueError("these rows were computed without their hidden states: name the layers in `Want.taps`")
        return self._features[i]


def _argmax(logits: Tensor) -> list[int]:
    return logits.argmax(-1).tolist()


class SequenceModel(Protocol):
    """One slot of a model: a network with a KV cache for one sequence. V vocabulary, n rows.

    Logits may be of any floating type and lie on the model's device, whose work may still be under way.
    """

    vocab_size: int
    max_seq_len: int  # positions that the cache has
    max_rows: int  # largest n of forward and greedy

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """Fill the cache from position 0 with at least one token, any number that fits: logits [V] of the last."""
        ...

    def forward(self, tokens: Sequence[int], position: int) -> Tensor:
        """Logits [n, V]: row i follows tokens[i]."""
        ...

    def greedy(self, tokens: Sequence[int], position: int) -> list[int]:
        """The n ids of greatest logit, one for each row of `forward`; only ids leave the device."""
        ...


@runtime_checkable
class Chains(Protocol):
    """A model that chains greedy steps without the host."""

    def draft_greedy(self, tokens: Sequence[int], position: int, k: int) -> list[int]:
        """Feed m >= 1 tokens, then each id found in turn: the k >= 1 greedy ids that follow, by m + k-1 positions."""
        ...


class Chain(NamedTuple):
    """Tokens chosen one after the other: the likeliest ones, or drawn.

    chances: the model's own probability of the likeliest token at each place and at all before it; no number (NaN) for
    a last one that was chosen by logits that are not finite. laws: [n, V of the text] what each was drawn from.
    """

    ids: list[int]
    chances: list[float]
    laws: Tensor | None = None


class Draws(NamedTuple):
    """How ids are drawn, each from the softmax of logits over temperature. words: 64 random bits for each of them.

    top_k, top_p: those of the target. Of the likeliest ids at least so many, or so much, stay; some more may.
    """

    temperature: float
    words: Sequence[int]
    top_k: int = 0
    top_p: float = 1.0


@runtime_checkable
class ChainsWhile(Protocol):
    """A model that may chain steps, and stop by its own probabilities, without the host."""

    @property
    def chains(self) -> bool:
        """Whether it does; if not, it is asked step by step."""
        ...

    def draft_while(
        self, tokens: Sequence[int], position: int, least: Sequence[float], draws: Draws | None = None
    ) -> Chain:
        """Feed m >= 1 tokens, then each id found in turn, to at most as many ids as there are numbers in `least`.

        It ends behind id i if the chance of the text up to there is below least[i].

        draws: how ids are drawn; None: the likeliest ones. What one is drawn from depends on its logits alone.
        """
        ...

    def draw(self, logits: Tensor, draws: Draws) -> Chain:
        """Draw one id from logits [1, V] as a chain would."""
        ...


@runtime_checkable
class Trees(Protocol):
    """A model whose forwards take trees. parents: as of `Rows`."""

    def forward(self, tokens: Sequence[int], position: int, parents: Sequence[int] | None = None) -> Tensor:
        """As of `SequenceModel`, of a tree's rows too."""
        ...

    def greedy(self, tokens: Sequence[int], position: int, parents: Sequence[int] | None = None) -> list[int]:
        """As of `SequenceModel`, of a tree's rows too."""
        ...

    def keep(self, position: int, rows: Sequence[int]) -> int:
        """Of a tree at position, make these rows (one below the other, row 0 first) the sequence itself.

        Returns how many of them the cache now holds as such; the others have to be fed again.
        """
        ...


class DraftModel(SequenceModel, Chains, Protocol):
    """What a draft model is asked for, in one slot."""


class TreeModel(Trees, DraftModel, Protocol):
    """What a draft model is asked for that drafts trees."""


@runtime_checkable
class EarlyExit(Protocol):
    """A model whose first layers draft for it."""

    def first_layers(self, count: int) -> DraftModel:
        """The model's first layers with its norm and head, as a model that drafts in this one's cache.

        What it writes there are this model's own keys and values. What it computed for tokens is not computed again
        when `forward` or `greedy` get them next. It has nothing to read at the start and no trees.
        """
        ...


@runtime_checkable
class Tapped(Protocol):
    """A model that can keep hidden states on their way."""

    def tap(self, layers: Sequence[int]) -> AbstractContextManager[list[Features]]:
        """While it is entered, keep the states of the rows computed; filled at the end: one tensor [n, H] a layer, or
        on a board one object for all."""
        ...


@runtime_checkable
class DraftHead(Protocol):
    """A draft head in one slot: it reads the target's hidden states, and its vocabulary may be a part of the target's.

    It is called as a `TreeModel` is, with three differences. The row of the token at position p >= 1 joins its
    embedding with a state of position p-1: the target's, where `states` has given it, else what the head itself passed
    on from the row before (in a tree: the parent's row). Position 0 has no row. Its logits are [n, V_d]; ids are the
    target's.
    """

    taps: tuple[int, ...]  # layers of the target that it reads, as of `Want.taps`
    lasting: bool  # whether states that it was given stay; else they are gone with the target's next forward
    target_ids: Tensor | None  # the target's id for each of its logits; None: they are the same
    target_vocab_size: int

    def states(self, features: Features, rows: Sequence[int], position: int) -> None:
        """Take the target's states of some positions.

        features: of a forward, as its `Step` gave them. rows: those of them that belong to the text, in its order.
        position: of the first; the others follow it.
        """
        ...

    def read(self, tokens: Sequence[int], position: int) -> Tensor | None:
        """Compute the rows of any number of tokens at position >= 1.., whose states before them were given.

        Logits [V_d] of the last; None where nothing but keys and values is computed.
        """
        ...

    def warm_up(self, tokens: Sequence[int]) -> None:
        """Prepare kernels for texts of this length, and overwrite the cache."""
        ...


class HeadChains(DraftHead, DraftModel, Protocol):
    """What a draft head is asked for that drafts chains, in one slot."""


class HeadModel(DraftHead, TreeModel, Protocol):
    """What a draft head is asked for, in one slot."""


@runtime_checkable
class Paged(Protocol):
    """A model whose sequences share a pool of positions, in pages, and the pages of what they begin with."""

    def reserve(self, slot: int, tokens: Sequence[int], positions: int) -> int | None:
        """Promise a free slot that many positions, for a sequence that begins with these tokens.

        `extend` then goes on from how many of them, at most all but one, the cache holds already: that number is
        returned. tokens: () where nothing may be reused, fewer where hidden states of the others are wanted. None: the
        pool has not so many positions now; it has them when other sequences have ended. `LanguageModel.free` gives
        them back.

        Raises UserError for more positions than the pool, or a sequence, ever has.
        """
        ...


@runtime_checkable
class FusedRounds(Protocol):
    """Greedy rounds of two models as one program: k drafted tokens, their verification, the accepted count."""

    @property
    def draft_lengths(self) -> Sequence[int]:
        """Those there is a program for, in rising order."""
        ...

    @property
    def features(self) -> Features | None:
        """Hidden states of the rows verified last, as `Step.features` gives them; None where nobody reads any."""
        ...

    def run(self, tokens: Sequence[int], position: int, k: int) -> tuple[list[int], list[int], int]:
        """Feed what is needed of a sequence, draft k, verify: (drafted [k], the target's ids [k + 1], accepted).

        tokens: the end of the sequence, the first of them at position, as many as a forward takes if there are so many;
        at least two. k: up to the longest there is a program for.
        """
        ...


@runtime_checkable
class Chooses(Protocol):
    """A model that can tell apart logits that are equal in its data type."""

    def chooser(self) -> Chooser:
        """What makes n ids of the logits [n, V] of the forward just computed, as its `greedy` does."""
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """One network on one device with a KV cache for several sequences, a slot each."""

    @property
    def limits(self) -> Limits:
        """What it can hold and compute."""
        ...

    def extend(self, rows: Sequence[Rows], want: Want = IDS) -> Step:
        """Compute rows of any number of sequences, at most one `Rows` a slot, and write their keys and values."""
        ...

    def slot(self, index: int) -> SequenceModel:
        """One slot as a model of one sequence; it has the capabilities that the model has."""
        ...

    def free(self, slot: int) -> None:
        """A sequence has ended: what its slot holds is not needed any more."""
        ...


class SlotBySlot:
    """The calls of `LanguageModel` for a network whose forwards take one sequence each: slot by slot.

    A class that inherits it has the methods of `SequenceModel`; with more than one slot it overrides `slot`.
    """

    vocab_size: int
    max_seq_len: int
    max_rows: int
    slots = 1

    @property
    def limits(self) -> Limits:
        """What it can hold and compute."""
        return Limits(self.max_rows, self.slots, self.max_seq_len, self.vocab_size)

    def slot(self, index: int) -> SequenceModel:
        """The model itself, which is its only slot."""
        if index:
            raise IndexError(f"slot {index} of a model with one")
        return cast("SequenceModel", self)

    def extend(self, rows: Sequence[Rows], want: Want = IDS) -> Step:
        """Compute rows of any number of sequences, one after the other.

        Raises UserError for more rows, or positions, than the limits allow, ValueError for what the model cannot do:
        two `Rows` of one slot, hidden states of a network that keeps none.
        """
        if len({each.slot for each in rows}) < len(rows):
            raise ValueError(f"several Rows of one slot: {[each.slot for each in rows]}")
        results: list[list[int] | Tensor] = []
        features: list[Features] = []
        choosers: list[Chooser] = []
        for each in rows:
            model = self.slot(each.slot)
            if want.taps:
                if not isinstance(model, Tapped):
                    raise ValueError(f"{type(model).__name__} keeps no hidden states: leave out taps")
                with model.tap(want.taps) as states:
                    results.append(_computed(model, each, want))
                features.append(_side_by_side(states))
            else:
                results.append(_computed(model, each, want))
            if want.logits:
                choosers.append(model.chooser() if isinstance(model, Chooses) else _argmax)
        return Step(results, features, choosers)

    def free(self, slot: int) -> None:
        """Nothing to give back: a slot's memory is its own."""


class OneSlot(SlotBySlot):
    """A model of one sequence as a `LanguageModel` of one slot."""

    def __init__(self, model: SequenceModel) -> None:
        self.model = model
        self.vocab_size, self.max_seq_len, self.max_rows = model.vocab_size, model.max_seq_len, model.max_rows

    def slot(self, index: int) -> SequenceModel:
        """The model itself."""
        super().slot(index)
        return self.model


def _computed(model: SequenceModel, rows: Rows, want: Want) -> list[int] | Tensor:
    """Of one sequence: logits [n, V], or n ids; of the last row alone where that is wanted."""
    _, tokens, position, parents, last = rows
    if last and position == 0:
        logits = model.prefill(tokens)[None]
        if want.logits:
            return logits
        return model.chooser()(logits) if isinstance(model, Chooses) else _argmax(logits)
    if last and parents is None:  # a further piece of a prompt, of any length
        while len(tokens) > model.max_rows:
            model.greedy(tokens[: model.max_rows], position)
            tokens, position = tokens[model.max_rows :], position + model.max_rows
    if len(tokens) > model.max_rows:
        raise UserError(f"{len(tokens)} rows exceed the {model.max_rows} of a forward: draft fewer tokens")
    result: list[int] | Tensor
    if parents is None:
        result = model.forward(tokens, position) if want.logits else model.greedy(tokens, position)
    elif isinstance(model, Trees):
        compute = model.forward if want.logits else model.greedy
        result = compute(tokens, position, parents)
    else:
        raise ValueError(f"{type(model).__name__} computes no trees: leave out parents")
    return result[-1:] if last else result


def _side_by_side(states: list[Features]) -> Features:
    """Hidden states [n, H] of each layer -> [n, layers x H]; a board keeps all layers as one."""
    if len(states) == 1:
        return states[0]
    import torch

    return torch.cat(states, -1)
