"""Decoding with a stack of layers on the device: decode, verify, trees and chains of drafted tokens.

Decode, verification and drafting are one function of R rows (`Decoder.decode`): a row's arithmetic is the same
whatever R is, since a tile has 32 rows anyway, and attention handles each row by itself, on the same number of cores
(`Layout.attention_program`). Rows of a tree differ in how they attend (`attend.TreeRows`): another kernel, so that on a
chip their last bits may differ from a decode's; where a chip has at most 16 query heads (N300, T3K) more than those, as
decode attention there takes an approximate exp.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import ttnn

from models.errors import UserError
from models.speculative.model import SlotBySlot
from models.speculative.tree import tree_levels
from models.ttnn_llama.modules.kept_states import KeptStates, NothingKept
from models.ttnn_llama.modules.rows import RowInputs, RowPlan, TreeInputs, make_row_plan
from models.ttnn_llama.programs.needed import KEPT, TREE
from models.ttnn_llama.shapes import MAX_ROWS, padded_rows

if TYPE_CHECKING:
    from models.ttnn_llama.device.runner import Runner
    from models.ttnn_llama.model import Layer
    from models.ttnn_llama.modules.layout import Layout
    from models.ttnn_llama.modules.lm_head import LMHead
    from models.ttnn_llama.modules.rope import RopeTables


class Decoder(SlotBySlot):
    """Embedding, layers and head: the forwards of `SequenceModel` but for the prompt's, as programs of a runner.

    One sequence, one slot: `extend` computes its rows by these forwards. A program is made when it is first asked for,
    or ahead by `prepare` and `prepare_chain`; it serves every forward of its kind that has no more rows. `TtnnLlama`
    and `FirstLayers` set the attributes.
    """

    layout: Layout
    rope: RopeTables
    runner: Runner
    mesh_device: ttnn.MeshDevice
    embedding: ttnn.Tensor
    layers: list[Layer]
    head: LMHead
    max_rows = MAX_ROWS
    kept: KeptStates | None = None  # what forwards leave for a draft head, where there is one

    def __init__(self, plans: dict[tuple[int, bool], RowPlan]) -> None:
        self._plans = plans  # by rows, and whether they are a tree's
        self._keeping = False  # whether the forwards asked for now keep their states
        # Of programs, by their keys: this model's id, what it gives, rows; of a chain also its length.
        self._inputs: dict[tuple, RowInputs] = {}
        self._tree_inputs: dict[tuple, TreeInputs] = {}
        self._chain_inputs: dict[tuple, tuple[RowInputs, RowInputs]] = {}

    # ------------------------------------------------------------------------------------------ decode, verify
    def forward(self, tokens: Sequence[int], position: int, parents: Sequence[int] | None = None) -> torch.Tensor:
        """Logits [n, V] fp32 of tokens [n <= 32] at position..: n = 1 is decoding, n = K + 1 verification.

        parents [m, n <= m <= 32]: the tree of which tokens are the last n rows. Row i is written at position + i,
        stands as many positions after row 0 as it has ancestors, and sees them and what lies before the tree.
        """
        return self._logits_of(self._run("logits", tokens, position, parents))[: len(tokens)]

    def greedy(self, tokens: Sequence[int], position: int, parents: Sequence[int] | None = None) -> list[int]:
        """The argmax ids [n] of `forward`; only ids leave the device."""
        return self.read(self._run("ids", tokens, position, parents))[: len(tokens)]

    def draft_greedy(self, tokens: Sequence[int], position: int, k: int) -> list[int]:
        """k chained greedy ids after tokens [m]: argmax feeds the next embedding, the host reads all ids at once.

        A chain follows one token or two, for which there may be programs; more are read first, by a forward.
        """
        self._check(len(tokens), position)
        self._check(len(tokens) + k - 1, position)
        self._check_rows(len(tokens))
        if len(tokens) > 2:
            self.greedy(tokens[:-1], position)
            tokens, position = tokens[-1:], position + len(tokens) - 1
        m = len(tokens)
        # A longer chain that is there already costs less than making a shorter one.
        key = self._preferred(key for key in self._chain_inputs if key[2] == m and key[3] >= k)
        key = key or self.prepare_chain(m, k)
        self._place_chain(self._chain_inputs[key], tokens, position, key[3])
        return self.read(self.runner.run(key))[:k]

    def prepare(self, what: str, n: int) -> tuple:
        """Register the program that gives "logits" or "ids" of up to n rows, "tree-logits" or "tree-ids" of a tree's,
        "kept-logits" or "kept-ids" where their hidden states are kept; returns its key."""
        self._check_rows(n)
        rows = padded_rows(n)
        key = (id(self), what, rows)
        if key not in self.runner:
            tree = what.startswith(TREE)
            plan = self.plan(rows, tree=tree)
            states = self.kept if what.startswith(KEPT) else None
            inputs: RowInputs
            if tree:
                inputs = self._tree_inputs[key] = self._new_tree_inputs(rows)
            else:
                inputs = self._inputs[key] = self.new_inputs(rows)
            if what.endswith("ids"):
                self.runner.add(key, lambda: self.head.argmax(self.decode(inputs, plan, states=states)))
            else:
                self.runner.add(key, lambda: self.decode(inputs, plan, states=states))
        return key

    def prepare_chain(self, m: int, k: int) -> tuple:
        """Register the program that drafts k ids after m tokens; returns its key."""
        self._check_rows(m)
        self._check_rows(k + 1)  # also what keeps a longer chain than asked for within the cache's last tile
        key = (id(self), "chain", m, k)
        if key not in self.runner:
            first, step = self.new_inputs(padded_rows(m)), self.new_inputs(1)
            self._chain_inputs[key] = (first, step)
            self.runner.add(key, lambda: ttnn.concat(self.chain(first, step, m, k), dim=0))
        return key

    def computed_rows(self, what: str, n: int) -> int:
        """Rows of the program that n rows of this kind run in."""
        key = self._program(what, n)
        return key[2] if key else padded_rows(n)

    # ----------------------------------------------------------------------- on the device, for programs
    def plan(self, rows: int, *, tree: bool = False) -> RowPlan:
        """The plan for R rows, made once."""
        if (rows, tree) not in self._plans:
            self._plans[rows, tree] = make_row_plan(rows, self.layout, self.rope, tree=tree)
        return self._plans[rows, tree]

    def new_inputs(self, rows: int) -> RowInputs:
        """Buffers for the inputs of R rows."""
        return RowInputs(rows, self.plan(rows).lookups, self.mesh_device)

    def _new_tree_inputs(self, rows: int) -> TreeInputs:
        return TreeInputs(rows, self.plan(rows, tree=True).lookups, self.layout.cache_length, self.mesh_device)

    def decode(
        self,
        inputs: RowInputs,
        plan: RowPlan,
        ids: ttnn.Tensor | None = None,
        *,
        embedded: ttnn.Tensor | None = None,
        states: KeptStates | None = None,
    ) -> ttnn.Tensor:
        """Logits [1, 1, R, V] row-major of the rows in ``inputs``.

        ids [R, 1], or what was looked up for them, embedded [1, 1, R, H]: in place of the inputs'. states: where hidden
        states are kept.
        """
        if embedded is None:
            embedded = self._embed(inputs.ids) if ids is None else self._embed_pages(ids)
        kept = states or NothingKept()
        x = ttnn.interleaved_to_sharded(embedded, self.layout.residual)
        kept.keep(0, x)
        tables = plan.rope_tables(inputs)
        for i, layer in enumerate(self.layers, 1):
            x = layer.decode_forward(x, tables, inputs, plan)
            kept.keep(i, x)
        return self.head.logits(x)

    def _embed(self, ids: ttnn.Tensor) -> ttnn.Tensor:
        """[1, R] uint32 -> [1, 1, R, H]."""
        return ttnn.unsqueeze_to_4D(ttnn.embedding(ids, self.embedding, layout=ttnn.TILE_LAYOUT))

    def _embed_pages(self, ids: ttnn.Tensor) -> ttnn.Tensor:
        """[R, 1] uint32, a page for each id -> [1, 1, R, H].

        Ids that a program has joined are pages: to join them in one row ttnn would transpose them on the compute
        engine.
        """
        rows = ttnn.embedding(ids, self.embedding, layout=ttnn.ROW_MAJOR_LAYOUT)
        return ttnn.to_layout(ttnn.reshape(rows, (1, 1, ids.shape[0], rows.shape[-1])), ttnn.TILE_LAYOUT)

    def chain(self, first: RowInputs, step: RowInputs, m: int, k: int) -> list[ttnn.Tensor]:
        """k greedy ids, [1, 1] each, after the m tokens in ``first``; ``step`` holds the position after them."""
        ids = self.head.argmax(self.decode(first, self.plan(first.rows)))
        drafted = [ids if first.rows == 1 else ttnn.slice(ids, [0, m - 1], [1, m])]
        for i in range(k - 1):
            if i:
                self._step_on(step)
            drafted.append(self.head.argmax(self.decode(step, self.plan(1), drafted[-1])))
        return drafted

    @staticmethod
    def _step_on(step: RowInputs) -> None:
        """One position further, on the device."""
        ttnn.plus_one(step.positions)
        ttnn.plus_one(step.lookups)

    @staticmethod
    def read(ids: ttnn.Tensor) -> list[int]:
        """Ids that are the same on all chips, on the host: waits for the device."""
        return ttnn.to_torch(ttnn.get_device_tensors(ids)[0]).view(-1).tolist()

    # ---------------------------------------------------------------------------------------------- internals
    def _run(self, what: str, tokens: Sequence[int], position: int, parents: Sequence[int] | None) -> ttnn.Tensor:
        n = len(tokens)
        if self._keeping and self.kept is not None:
            if parents is not None:
                raise UserError("a draft head on a board drafts chains: use --drafter head or combined, not tree")
            what = KEPT + what
            self.kept.begin(prompt=False)
        if parents is None:
            self._check(n, position)
            key = self._program(what, n) or self.prepare(what, n)
            self._inputs[key].fill(tokens, position)
        else:
            what = TREE + what
            self._check_tree(n, position, parents)
            key = self._program(what, n) or self.prepare(what, n)
            self._tree_inputs[key].fill_tree(tokens, position, parents)
        return self.runner.run(key)

    def _place_chain(self, inputs: tuple[RowInputs, RowInputs], tokens: Sequence[int], position: int, k: int) -> None:
        """Fill the inputs of a chain of k ids after tokens at position.."""
        first, step = inputs
        first.fill(tokens, position)
        step.place(position + len(tokens))

    def _program(self, what: str, n: int) -> tuple | None:
        """Key of the program that runs n rows: of those that have room, one that is a trace, then the smallest."""
        keys = (*self._inputs, *self._tree_inputs)
        return self._preferred(key for key in keys if key[1] == what and key[2] >= n)

    def _preferred(self, keys: Iterable[tuple]) -> tuple | None:
        return min(keys, key=lambda key: (not self.runner.is_trace(key), key[1:]), default=None)

    def _logits_of(self, logits: ttnn.Tensor) -> torch.Tensor:
        """[rows, V] fp32 of logits that are the same on all chips."""
        return ttnn.to_torch(ttnn.get_device_tensors(logits)[0]).view(-1, self.vocab_size).float()

    def _check(self, n: int, position: int) -> None:
        if n < 1 or position < 0 or position + n > self.max_seq_len:
            raise UserError(
                f"{n} tokens at position {position} do not fit the context of {self.max_seq_len}: "
                "shorten the prompt or raise --max-seq-len"
            )

    def _check_tree(self, n: int, position: int, parents: Sequence[int]) -> None:
        if not 1 <= n <= len(parents) <= MAX_ROWS:
            raise UserError(f"{n} of {len(parents)} rows of a tree are outside 1..{MAX_ROWS}: draft fewer tokens")
        self._check(tree_levels(parents), position)  # its rows may lie beyond the context, there is room for them

    @staticmethod
    def _check_rows(n: int) -> None:
        if n > MAX_ROWS:
            raise UserError(f"{n} rows exceed the {MAX_ROWS} of a tile: draft at most {MAX_ROWS - 1} tokens")
