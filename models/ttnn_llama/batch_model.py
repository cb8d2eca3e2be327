"""Llama in TT-NN for several sequences at once: a paged KV cache, and the rows of several users in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import ttnn

from models.errors import UserError
from models.speculative.model import IDS, Limits, Rows, Step, Want, in_turns
from models.ttnn_llama.model import BoardLlama
from models.ttnn_llama.modules.batch_rows import BatchInputs, Share, make_batch_plan
from models.ttnn_llama.modules.decoder import Decoder
from models.ttnn_llama.modules.kv_cache import PagedCache, PromptPages
from models.ttnn_llama.pages import Pages
from models.ttnn_llama.shapes import KV_BLOCK, MAX_ROWS, PREFILL_CHUNK, padded_prompt, padded_rows, pages_of, pool_pages

if TYPE_CHECKING:
    from models.ttnn_llama.modules.rows import RowInputs, RowPlan

CHUNKS = (128, 256, 512, PREFILL_CHUNK)  # positions of a forward that reads on in a prompt whose beginning is known


class UserRows(NamedTuple):
    """One user's rows of a forward: tokens at position.. of a slot."""

    slot: int
    tokens: Sequence[int]
    position: int


class BatchLlama(BoardLlama):
    """A Llama on all chips of a mesh, for several sequences; its arguments and errors are those of `BoardLlama`.

    Implements `models.speculative.model.LanguageModel` and `Paged`. `extend` computes the rows of all sequences in one
    forward, or in as few as they fit in with 32 each; prompts are read one after the other. A row's arithmetic is its
    own whatever rows are beside it, so that a text does not depend on its company. Called as a model of one sequence it
    is its first slot.

    A program is made for so many rows, with so many of one user (turns, see `batch_rows`); which rows are whose is
    input. It serves every forward that has no more of either.
    """

    def _make_cache(self) -> list[PagedCache]:
        self.pages = Pages(self.slots, self.layout.cache_length, pool_pages(self.slots, self.max_seq_len, self._pool))
        self._going_on: dict[int, int] = {}  # where the prompts of slots go on whose beginnings were there
        self._prompt = PromptPages(self.layout, self.pages.count)
        layers = range(self.config.num_hidden_layers)
        return [PagedCache(self.layout, self.pages.count, self._prompt) for _ in layers]

    # ---------------------------------------------------------------------------------------------- all slots
    @property
    def limits(self) -> Limits:
        """What it can hold and compute."""
        whole = self.slots * self.max_seq_len
        pool = whole if self._pool is None else min(whole, self._pool)
        return Limits(self.max_rows, self.slots, self.max_seq_len, self.vocab_size, pool, MAX_ROWS)

    def slot(self, index: int) -> Slot:
        """One slot as a model of one sequence, which chains greedy steps too."""
        if not 0 <= index < self.slots:
            raise IndexError(f"slot {index} of a model with {self.slots}")
        return Slot(self, index)

    def reserve(self, slot: int, tokens: Sequence[int], positions: int) -> int | None:
        """Promise a free slot so many positions; arguments, result and errors as of `speculative.model.Paged`.

        Beginnings are reused in whole pages, of prompts that were read as such. What follows is read by the same
        kernels, with the bits of a prompt read anew.
        """
        if not len(tokens) <= positions <= self.max_seq_len:
            raise UserError(
                f"{positions} positions for {len(tokens)} tokens do not fit the context of {self.max_seq_len}: shorten "
                "the prompt or raise --max-seq-len"
            )
        held = self.pages.promise(slot, [int(token) for token in tokens], positions)
        self._going_on.pop(slot, None)
        if held:
            self._going_on[slot] = held
        return held

    def extend(self, rows: Sequence[Rows], want: Want = IDS) -> Step:
        """Compute rows of any number of sequences: whole prompts one after the other, all others together.

        Raises UserError for more rows, or positions, than the limits allow, and where no page is left; ValueError for
        what the model cannot do: two `Rows` of one slot, trees, hidden states.
        """
        known = {each.slot: self._going_on.pop(each.slot, 0) for each in rows}
        chains = [i for i, each in enumerate(rows) if each.parents is None]
        if len({each.slot for each in rows}) < len(rows) or want.taps:
            chains = []  # what is wrong is said below
        read = [i for i in chains if _is_prompt(rows[i], known[rows[i].slot])]
        together = [i for i in chains if i not in read]
        results: dict[int, list[int] | torch.Tensor] = {}
        for turn in in_turns([len(rows[i].tokens) for i in together], MAX_ROWS):
            group = [together[i] for i in turn]
            made = self._computed_together([rows[i] for i in group], want)
            results |= zip(group, made, strict=True)
        for i in read:
            slot, tokens, position = rows[i][:3]
            if position and position % KV_BLOCK == 0:  # a prompt goes on where pages begin
                logits = self.read_prompt(slot, tokens, position)[None]
                results[i] = logits if want.logits else logits.argmax(-1).tolist()
        others = [i for i in range(len(rows)) if i not in results]
        step = super().extend([rows[i] for i in others], want)
        for place, i in enumerate(others):
            results[i] = step.logits(place) if want.logits else step.ids()[place]
        return Step([results[i] for i in range(len(rows))])

    def free(self, slot: int) -> None:
        """A sequence has ended: its pages are free."""
        self._going_on.pop(slot, None)
        self.pages.release(slot)

    def run(self, what: str, users: Sequence[UserRows]) -> ttnn.Tensor:
        """ "logits" or "ids" of the rows of users, one behind the other, on the device; filled up to the program's."""
        for each in users:
            self._check(len(each.tokens), each.position)
        counts = [len(each.tokens) for each in users]
        key = self._program(what, sum(counts), max(counts)) or self.prepare(what, sum(counts), max(counts))
        for each in users:
            self.pages.write(each.slot, each.position, each.position + len(each.tokens))
        shares = [Share(each.tokens, each.position, self.pages.of(each.slot)) for each in users]
        cast("BatchInputs", self._inputs[key]).fill_shares(shares)
        return self.runner.run(key)

    def read_prompt(self, slot: int, tokens: Sequence[int], position: int = 0) -> torch.Tensor:
        """Fill the cache of a slot from a position, a multiple of 128: logits [V] fp32 that follow the last token."""
        n = len(tokens)
        self._check(n, position)
        if self._prompts_in_rows:
            for start in range(0, n, MAX_ROWS):
                rows = tokens[start : start + MAX_ROWS]
                logits = self.run("logits", [UserRows(slot, rows, position + start)])
                self.pages.note(slot, position + start, rows)
            return self._logits_of(logits)[len(rows) - 1]
        self.pages.write(slot, position, position + n)
        start = 0
        for size in _chunks(n, whole=position == 0):
            chunk = tokens[start : start + size]
            self._prompt.place(self.pages.of(slot)[: pages_of(position + n)], position + start)
            x = self._prefill_chunk(chunk, position + start)
            start += size
        self.pages.note(slot, position, tokens)
        return self._last_logits(x, self._on_device([[len(chunk) - 1]]))

    def _chunk_tables(self, start: int, m: int) -> list[ttnn.Tensor]:
        last = self.layout.cache_length - 1
        return self.rope.chunk(self._on_device([[min(position, last) for position in range(start, start + m)]]))

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
        sizes = {padded_prompt(size) for size in _chunks(length, whole=True)}
        sizes |= {size for size in CHUNKS if size < length}  # its beginning may be there
        self._prompt.place([], 0)
        for size in sorted(sizes):
            self._last_logits(self._prefill_chunk([0] * size, 0), self._on_device([[0]]))

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
        return BatchInputs(rows, self.plan(rows).lookups, turns or rows, self._table_width, self.layout)

    @property
    def _table_width(self) -> int:
        """Pages that a row's table has: of the longest sequence, as far as there are so many."""
        return min(pages_of(self.layout.cache_length), self.pages.count)

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
        pages.write(self._index, position, end + k - 1)
        first, step = cast("tuple[BatchInputs, BatchInputs]", inputs)
        own = pages.of(self._index)
        first.fill_shares([Share(tokens, position, own)])
        step.place_shares([Share([0], end, own)])


def _is_prompt(rows: Rows, known: int) -> bool:
    """Whether they are read as prompts are: from position 0, behind a known beginning, or more than a forward has."""
    return rows.last and (rows.position in (0, known) or len(rows.tokens) > MAX_ROWS)


def _chunks(n: int, whole: bool) -> list[int]:
    """n tokens of a prompt in pieces that are read one after the other.

    whole: a prompt from its begin, in as few as there can be. What follows a known beginning may have any length and
    begin at any page: it is read in few sizes, so that there are programs for all of them.
    """
    pieces, left = [], n
    while left:
        size = PREFILL_CHUNK if whole else max(size for size in CHUNKS if size <= padded_prompt(left))
        pieces.append(min(left, size))
        left -= pieces[-1]
    return pieces
