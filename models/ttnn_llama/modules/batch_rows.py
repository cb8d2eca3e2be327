"""The rows of several users in one forward: their inputs, and how they are written to a paged cache.

A core reads a tile of the cache, changes one row of it and writes it back, and with pages ttnn lets no core wait for
another: two rows of one tile in one call would undo each other. Pages have one owner each, so rows of different users
never meet; rows of one user are written by calls one after the other, a turn for each (docs/kernels.md, question 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import ttnn

from models.ttnn_llama.modules.attend import PagedRows
from models.ttnn_llama.modules.kv_cache import LayerCache, PagedCache
from models.ttnn_llama.modules.layout import Layout
from models.ttnn_llama.modules.rope import RopeTables
from models.ttnn_llama.modules.rows import FusedRowPlan, RowInputs, RowPlan, SeparateRowPlan
from models.ttnn_llama.shapes import KV_BLOCK, TILE

SKIPPED = -1  # a position: neither read nor written


class Share(NamedTuple):
    """One user's share of a forward: tokens at position.., in a sequence that has these pages."""

    tokens: Sequence[int]
    position: int
    pages: Sequence[int]


class BatchInputs(RowInputs):
    """Inputs of R rows, shared among users in any way: also where each row's pages are, and when it is written.

    tables [R, W] int32: the pages of each row's sequence. turns, each [R] int32: positions of the rows that a call
    writes, -1 for all others. All that depends on users and positions is in buffers, so that one program serves every
    sharing of up to R rows, with up to as many rows for a user as there are turns.
    """

    def __init__(self, rows: int, lookups: int, turns: int, width: int, layout: Layout):
        super().__init__(rows, lookups, layout.mesh_device)
        self._width = width
        self.tables = self._buffer(self._tables([]), layout.mesh_device)
        # A user's only row is written with all others: at the positions that attention reads, in one call.
        self.turns = [self.positions]
        if turns > 1:
            self.turns = [self._buffer(self._turn([]), layout.mesh_device) for _ in range(turns)]

    def fill_shares(self, shares: Sequence[Share]) -> None:
        """Copy the rows of users to the device: each share behind the one before it.

        Raises ValueError for more rows than there are, more of one user than turns, or two rows that would be written
        to one tile in one turn.
        """
        self.place_shares(shares)
        tokens = [token for share in shares for token in share.tokens]
        ttnn.copy_host_to_device_tensor(self._ids(tokens), self.ids)

    def place_shares(self, shares: Sequence[Share]) -> None:
        """Set all but the ids, of shares with tokens of any value."""
        places = [(share.position + i, i, share.pages) for share in shares for i in range(len(share.tokens))]
        if len(places) > self.rows:
            raise ValueError(f"{len(places)} rows in a program of {self.rows}")
        turns = _turns(places, len(self.turns))
        positions = [position for position, _, _ in places]
        self._set_places(positions, positions)
        ttnn.copy_host_to_device_tensor(self._tables([pages for _, _, pages in places]), self.tables)
        if len(self.turns) > 1:
            for turn, buffer in zip(turns, self.turns, strict=True):
                ttnn.copy_host_to_device_tensor(self._turn(turn), buffer)

    def _tables(self, rows: Sequence[Sequence[int]]) -> ttnn.Tensor:
        padded = [[*pages, *[0] * (self._width - len(pages))] for pages in rows]
        return self._host(padded + [[0] * self._width] * (self.rows - len(rows)), ttnn.int32)

    def _turn(self, positions: Sequence[int]) -> ttnn.Tensor:
        return self._host([*positions, *[SKIPPED] * (self.rows - len(positions))], ttnn.int32)


def _turns(places: Sequence[tuple[int, int, Sequence[int]]], count: int) -> list[list[int]]:
    """Positions of each row by turn, from (position, which row of its user, the user's pages) of each row."""
    turns = [[SKIPPED] * len(places) for _ in range(count)]
    written: set[tuple[int, int, int]] = set()
    for row, (position, turn, pages) in enumerate(places):
        if turn >= count:
            raise ValueError(f"{turn + 1} rows of one user in a program of {count} turns")
        tile = turn, pages[position // KV_BLOCK], position % KV_BLOCK // TILE
        if tile in written:
            raise ValueError(f"row {row} would be written into a tile of page {tile[1]} together with another user's")
        written.add(tile)
        turns[turn][row] = position
    return turns


class PagedFusedRowPlan(FusedRowPlan):
    """As `FusedRowPlan`, into pages: a call for each turn."""

    def store(self, cache: LayerCache | PagedCache, k: ttnn.Tensor, v: ttnn.Tensor, inputs: RowInputs) -> None:
        batch = cast("BatchInputs", inputs)
        for turn in batch.turns:
            ttnn.experimental.paged_fused_update_cache(
                cache.keys, k, cache.values, v, update_idxs_tensor=turn, page_table=batch.tables
            )


class PagedSeparateRowPlan(SeparateRowPlan):
    """As `SeparateRowPlan`, into pages: two calls for each turn."""

    def store(self, cache: LayerCache | PagedCache, k: ttnn.Tensor, v: ttnn.Tensor, inputs: RowInputs) -> None:
        batch = cast("BatchInputs", inputs)
        for kept, new in ((cache.keys, k), (cache.values, v)):
            for turn in batch.turns:
                ttnn.experimental.paged_update_cache(kept, new, update_idxs_tensor=turn, page_table=batch.tables)


def make_batch_plan(rows: int, layout: Layout, rope: RopeTables) -> RowPlan:
    """The plan with the fewest ops that the grid has cores for."""
    plan = PagedFusedRowPlan if 2 * rows <= layout.cores.count else PagedSeparateRowPlan
    return plan(rows, layout, rope, PagedRows(rows, layout))
