"""Llama in TT-NN for several sequences at once: a paged KV cache, and the rows of several users in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import ttnn

from models.errors import UserError
from models.speculative.model import IDS, Rows, Step, Want
from models.ttnn_llama.model import BoardLlama
from models.ttnn_llama.modules.batch_rows import BatchInputs, Share, make_batch_plan
from models.ttnn_llama.modules.decoder import Decoder
from models.ttnn_llama.modules.kv_cache import PagedCache, PromptPages
from models.ttnn_llama.pages import Pages
from models.ttnn_llama.shapes import MAX_ROWS, PREFILL_CHUNK, padded_rows

if TYPE_CHECKING:
    from models.ttnn_llama.modules.rows import RowInputs, RowPlan


class UserRows(NamedTuple):
    """One user's rows of a forward: tokens at position.. of a slot."""

    slot: int
    tokens: Sequence[int]
    position: int


class BatchLlama(BoardLlama):
    """A Llama on all chips of a mesh, for several sequences; its arguments and errors are those of `BoardLlama`.

    Implements `models.speculative.model.LanguageModel`. `extend` computes the rows of all sequences in one forward, or
    in as few as they fit in with 32 each; prompts are read one after the other. A row's arithmetic is its own whatever
    rows are beside it, so that a text does not depend on its company. Called as a model of one sequence it is its
    first slot.

    A program is made for so many rows, with so many of one user (turns, see `batch_rows`); which rows are whose is
    input. It serves every forward that has no more of either.
    """

    def _make_cache(self) -> list[PagedCache]:
        self.pages = Pages(self.slots, self.layout.cache_length)
        self._prompt = PromptPages(self.layout)
        layers = range(self.config.num_hidden_layers)
        return [PagedCache(self.layout, self.pages.count, self._prompt) for _ in layers]

    # ---------------------------------------------------------------------------------------------- all slots
    def slot(self, index: int) -> Slot:
        """One slot as a model of one sequence, which chains greedy steps too."""
        if not 0 <= index < self.slots:
            raise IndexError(f"slot {index} of a model with {self.slots}")
        return Slot(self, index)

    def extend(self, rows: Sequence[Rows], want: Want = IDS) -> Step:
        """Compute rows of any number of sequences: whole prompts one after the other, all others together.

        Raises UserError for more rows, or positions, than the limits allow, and where no page is left; ValueError for
        what the model cannot do: two `Rows` of one slot, trees, hidden states.
        """
        together = [i for i, each in enumerate(rows) if each.parents is None and not _is_prompt(each)]
        if len({each.slot for each in rows}) < len(rows) or want.taps:
            together = []  # what is wrong is said below
        results: dict[int, list[int] | torch.Tensor] = {}
        for group in _groups(together, [len(rows[i].tokens) for i in together]):
            made = self._computed_together([rows[i] for i in group], want)
            results |= zip(group, made, strict=True)
        others = [i for i in range(len(rows)) if i not in results]
        step = super().extend([rows[i] for i in others], want)
        for place, i in enumerate(others):
            results[i] = step.logits(place) if want.logits else step.ids()[place]
        return Step([results[i] for i in range(len(rows))])

    def free(self, slot: int) -> None:
        """A sequence has ended: its pages are free."""
        self.pages.release(slot)

    def run(self, what: str, users: Sequence[UserRows]) -> ttnn.Tensor:
        """ "logits" or "ids" of the rows of users, one behind the other, on the device; filled up to the program's."""
        for each in users:
            self._check(len(each.tokens), each.position)
        counts = [len(each.tokens) for each in users]
        key = self._program(what, sum(counts), max(counts)) or self.prepare(what, sum(counts), max(counts))
        for each in users:
            self.pages.reserve(each.slot, each.position + len(each.tokens))
        shares = [Share(each.tokens, each.position, self.pages.of(each.slot)) for each in users]
        cast("BatchInputs", self._inputs[key]).fill_shares(shares)
        return self.runner.run(key)

    def read_prompt(self, slot: int, tokens: Sequence[int]) -> torch.Tensor:
        """Fill the cache of a slot from position 0: logits [V] fp32 that follow the last token."""
        n = len(tokens)
        self._check(n, 0)
        if self._prompts_in_rows:
            for start in range(0, n, MAX_ROWS):
                rows = tokens[start : start + MAX_ROWS]
                logits = self.run("logits", [UserRows(slot, rows, start)])
            return self._logits_of(logits)[len(rows) - 1]
        self.pages.reserve(slot, n)
        for start in range(0, n, PREFILL_CHUNK):
            self._prompt.place(self.pages.of(slot), start)
            x = self._prefill_chunk(tokens[start : start + PREFILL_CHUNK], start)
        return self._last_logits(x, self._on_device([[(n - 1) % PREFILL_CHUNK]]))

    def _computed_together(self, rows: Sequence[Rows], want: Want) -> list[list[int]] | list[torch.Tensor]:
        """Of each sequence logits [n, V], or n ids; of the last row alone where that is wanted."""
        counts = [len(each.tokens) for each in rows]
        users = [UserRows(each.slot, each.tokens, each.position) for each in rows]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        wanted = [
            slice(start + n - 1 if each.last else start, start + n)
            for each, start, n in zip(rows, starts, counts, strict=True)
        ]
        if want.logits:
            logits = self._logits_of(self.run("logits", users))
            return [logits[part] for part in wanted]
        ids = self.read(self.run("ids", users))
        return [ids[part] for part in wanted]

    def warm_up(self, length: int) -> None:
        """Compile what a prompt of this length needs, while texts are under way: it is written to no page."""
        if self._prompts_in_rows:
            return  # by the programs that `prepare` has made
        for start in range(0, length, PREFILL_CHUNK):
            self._prompt.place([], start)
            x = self._prefill_chunk([0] * min(PREFILL_CHUNK, length - start), start)
        self._last_logits(x, self._on_device([[0]]))

    def rest(self) -> None:
        """Leave nothing in the inputs of programs that a run would write: before they are compiled or captured."""
        chains = (each for pair in self._chain_inputs.values() for each in pair)
        for inputs in (*self._inputs.values(), *chains):
            cast("BatchInputs", inputs).place_shares([])

    # ---------------------------------------------------------------------------------------------- programs
    def prepare(self, what: str, n: int, turns: int | None = None) -> tuple:
        """Register the program that gives "logits" or "ids" of up to n rows, up to turns (default: all) of one user;
        returns its key."""
        self._check_rows(n)
        rows = padded_rows(n)
        key = (id(self), what, rows, padded_rows(min(turns or n, n)))
        if key not in self.runner:
            plan, inputs = self.plan(rows), self.new_inputs(rows, key[3])
            self._inputs[key] = inputs
            if what == "ids":
                self.runner.add(key, lambda: self.head.argmax(self.decode(inputs, plan)))
            elif what == "logits":
                self.runner.add(key, lambda: self.decode(inputs, plan))
            else:
                raise ValueError(f"several sequences have no program of {what!r}: ids or logits")
        return key

    def plan(self, rows: int, *, tree: bool = False) -> RowPlan:
        """The plan for R rows, made once."""
        if (rows, tree) not in self._plans:
            self._plans[rows, tree] = make_batch_plan(rows, self.layout, self.rope)
        return self._plans[rows, tree]

    def new_inputs(self, rows: int, turns: int | None = None) -> BatchInputs:
        """Buffers for the inputs of R rows, up to turns (default: all) of one user."""
        return BatchInputs(rows, self.plan(rows).lookups, turns or rows, self.layout)

    @staticmethod
    def _step_on(step: RowInputs) -> None:
        ttnn.plus_one(step.positions, skip_negative_entries=True)  # where it rests, it stays
        ttnn.plus_one(step.lookups)

    def _program(self, what: str, n: int, turns: int | None = None) -> tuple | None:
        turns = n if turns is None else turns
        return self._preferred(key for key in self._inputs if key[1] == what and key[2] >= n and key[3] >= turns)

    # ---------------------------------------------------------------------------------------------- as its first slot
    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        """As of the first slot."""
        return self.slot(0).prefill(tokens)

    def draft_greedy(self, tokens: Sequence[int], position: int, k: int) -> list[int]:
        """As of the first slot."""
        return self.slot(0).draft_greedy(tokens, position, k)

    def _run(self, what: str, tokens: Sequence[int], position: int, parents: Sequence[int] | None) -> ttnn.Tensor:
        return self.slot(0)._run(what, tokens, position, parents)


class Slot(Decoder):
    """One slot of a `BatchLlama`, as a model of one sequence, by the programs of the whole.

    Implements `LanguageModel` of one slot, `SequenceModel` and `Chains`.
    """

    def __init__(self, model: BatchLlama, index: int):
        super().__init__(model._plans)
        self._model, self._index = model, index
        self._inputs, self._chain_inputs = model._inputs, model._chain_inputs
        self.mesh_device, self.runner, self.layout, self.rope = (
            model.mesh_device,
            model.runner,
            model.layout,
            model.rope,
        )
        self.embedding, self.layers, self.head = model.embedding, model.layers, model.head
        self.vocab_size, self.max_seq_len = model.vocab_size, model.max_seq_len

    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        """Fill the cache from position 0: logits [V] fp32 that follow the last token."""
        return self._model.read_prompt(self._index, tokens)

    def prepare(self, what: str, n: int) -> tuple:
        """As of the whole model: n rows of one user."""
        return self._model.prepare(what, n)

    def prepare_chain(self, m: int, k: int) -> tuple:
        """As of the whole model, for any slot."""
        return self._model.prepare_chain(m, k)

    def _run(self, what: str, tokens: Sequence[int], position: int, parents: Sequence[int] | None) -> ttnn.Tensor:
        if parents is not None:
            raise UserError("a board that writes several texts verifies chains: use another drafter than tree")
        return self._model.run(what, [UserRows(self._index, tokens, position)])

    def _place_chain(self, inputs: tuple[RowInputs, RowInputs], tokens: Sequence[int], position: int, k: int) -> None:
        pages, end = self._model.pages, position + len(tokens)
        pages.reserve(self._index, end + k - 1)
        first, step = cast("tuple[BatchInputs, BatchInputs]", inputs)
        own = pages.of(self._index)
        first.fill_shares([Share(tokens, position, own)])
        step.place_shares([Share([0], end, own)])


def _is_prompt(rows: Rows) -> bool:
    """Whether they are read as prompts are: from position 0, or more than a forward has."""
    return rows.last and (rows.position == 0 or len(rows.tokens) > MAX_ROWS)


def _groups(items: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """Items in their order, in groups of at most 32 rows; one that has more is a group, to be refused."""
    groups: list[list[int]] = []
    room = 0
    for item, count in zip(items, counts, strict=True):
        if count > room or not groups:
            groups.append([])
            room = MAX_ROWS
        groups[-1].append(item)
        room -= count
    return groups
