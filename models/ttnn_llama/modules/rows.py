"""What a decode or verify forward of R rows needs besides weights: its inputs, and the ops that depend on R.

A row is a position of the one sequence: row i stands at position p + i. Rows of a tree are written there too, but
stand, for the rope, one behind their parent. Rows beyond the tokens given carry position -1, which the cache update
and causal attention skip.
"""

from collections.abc import Callable, Sequence

import torch
import ttnn

from models.speculative.tree import tree_depths, tree_sights
from models.ttnn_llama.modules.attend import CausalRows, PagedRows, TreeRows
from models.ttnn_llama.modules.kv_cache import LayerCache, PagedCache
from models.ttnn_llama.modules.layout import Layout
from models.ttnn_llama.modules.rope import RopeTables, rotation_tile
from models.ttnn_llama.shapes import HIDDEN, KV_BLOCK, TILE


class RowInputs:
    """The persistent input buffers of one forward of R rows, and how to fill them.

    ids [1, R] uint32, positions [R] int32 (in the cache, and what causal attention sees), lookups [1, m] uint32 (for
    the rope tables: where rows stand, twice over where q and k are rotated together).
    """

    def __init__(self, rows: int, lookups: int, mesh_device: ttnn.MeshDevice):
        self.rows = rows
        self.repeats = lookups // rows
        self._mapper = ttnn.ReplicateTensorToMesh(mesh_device)
        self.ids, self.positions, self.lookups = (
            self._buffer(tensor, mesh_device) for tensor in (self._ids([0]), *self._places([0], [0]))
        )

    def fill(self, tokens: Sequence[int], position: int) -> None:
        """Copy tokens [n <= R] standing at position.. to the device, into the same buffers."""
        where = range(position, position + len(tokens))
        ttnn.copy_host_to_device_tensor(self._ids(tokens), self.ids)
        self._set_places(where, where)

    def place(self, position: int) -> None:
        """Set the positions alone, for a forward whose ids are found on the device."""
        where = range(position, position + self.rows)
        self._set_places(where, where)

    def _set_places(self, positions: Sequence[int], lookups: Sequence[int]) -> None:
        hosts = self._places(positions, lookups)
        for host, buffer in zip(hosts, (self.positions, self.lookups), strict=True):
            ttnn.copy_host_to_device_tensor(host, buffer)

    def _ids(self, tokens: Sequence[int]) -> ttnn.Tensor:
        return self._host([[*tokens, *[0] * (self.rows - len(tokens))]], ttnn.uint32)

    def _places(self, positions: Sequence[int], lookups: Sequence[int]) -> list[ttnn.Tensor]:
        padding = self.rows - len(positions)
        return [
            self._host([*positions, *[-1] * padding], ttnn.int32),
            self._host([[*lookups, *[0] * padding] * self.repeats], ttnn.uint32),
        ]

    def _host(self, values: list, dtype: ttnn.DataType) -> ttnn.Tensor:
        numbers = torch.tensor(values, dtype=torch.int32)
        return ttnn.from_torch(numbers, dtype=dtype, layout=ttnn.ROW_MAJOR_LAYOUT, mesh_mapper=self._mapper)

    @staticmethod
    def _buffer(host: ttnn.Tensor, mesh_device: ttnn.MeshDevice) -> ttnn.Tensor:
        return ttnn.to_device(host, mesh_device, memory_config=ttnn.DRAM_MEMORY_CONFIG)


class HeadInputs(RowInputs):
    """Inputs of R rows of a draft head: also which rows of kept states come before them.

    picks [1, R] uint32 (rows of the buffers), last [1, 1] uint32 (of these rows, the last that is a token's).
    """

    def __init__(self, rows: int, lookups: int, mesh_device: ttnn.MeshDevice):
        super().__init__(rows, lookups, mesh_device)
        self.picks, self.last = (self._buffer(tensor, mesh_device) for tensor in self._choices([0]))

    def fill_picked(self, tokens: Sequence[int], position: int, picks: Sequence[int]) -> None:
        """Copy tokens [n <= R] standing at position.. to the device, and the rows of the states before them."""
        self.fill(tokens, position)
        for host, buffer in zip(self._choices(picks), (self.picks, self.last), strict=True):
            ttnn.copy_host_to_device_tensor(host, buffer)

    def _choices(self, picks: Sequence[int]) -> list[ttnn.Tensor]:
        padded = [*picks, *[picks[0]] * (self.rows - len(picks))]
        return [self._host([padded], ttnn.uint32), self._host([[len(picks) - 1]], ttnn.uint32)]


class TreeInputs(RowInputs):
    """Inputs of R rows of a tree: also what each of them sees of the cache.

    mask [1, 1, R, S] bf16, added to scores: 0 or HIDDEN. blocks [1, 1, 1, S / 128] int32: 1 for those of which any row
    sees something; the others are neither read nor computed. All that depends on the tree or on where it stands is in
    these two, so that one program serves every tree of R rows.
    """

    def __init__(self, rows: int, lookups: int, cache_length: int, mesh_device: ttnn.MeshDevice):
        super().__init__(rows, lookups, mesh_device)
        self.cache_length = cache_length
        self.mask, self.blocks = (self._buffer(tensor, mesh_device) for tensor in self._sights(0, [1]))

    def fill_tree(self, tokens: Sequence[int], position: int, parents: Sequence[int]) -> None:
        """Copy tokens to the device, the last rows of the tree that begins at a position; see `Decoder.forward`."""
        depths, seen = tree_depths(parents), tree_sights(parents)
        first = len(parents) - len(tokens)
        ttnn.copy_host_to_device_tensor(self._ids(tokens), self.ids)
        self._set_places(
            range(position + first, position + len(parents)), [position + depth for depth in depths[first:]]
        )
        for host, buffer in zip(self._sights(position, seen[first:]), (self.mask, self.blocks), strict=True):
            ttnn.copy_host_to_device_tensor(host, buffer)

    def _sights(self, position: int, seen: Sequence[int]) -> list[ttnn.Tensor]:
        """Mask and blocks of rows that see all before a position, and of the tree there what their bits say."""
        size = max(bits.bit_length() for bits in seen)
        seen = [*seen, *[1] * (self.rows - len(seen))]  # padding sees the tree's first row: something has to be seen
        tree = torch.tensor([[bits >> i & 1 for i in range(size)] for bits in seen], dtype=torch.bool)
        mask = torch.full((self.rows, self.cache_length), HIDDEN, dtype=torch.bfloat16)
        mask[:, :position] = 0
        mask[:, position : position + size].masked_fill_(tree, 0)
        blocks = [1 if start < position + size else 0 for start in range(0, self.cache_length, KV_BLOCK)]
        tiled = ttnn.from_torch(
            mask[None, None], dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, mesh_mapper=self._mapper
        )
        return [tiled, self._host([[[blocks]]], ttnn.int32)]


class RowPlan:
    """Ops and memory configurations of a forward of exactly R rows; `make_row_plan` chooses the form.

    attend: from q [1, R, Q, D], the cache and the inputs (of a tree's rows: `TreeInputs`) to the heads' results side by
    side; see `attend`.
    """

    overlap_heads: bool
    lookups: int  # rope rows looked up

    def __init__(self, rows: int, layout: Layout, rope: RopeTables, attend: PagedRows | TreeRows):
        mesh_device, cores = layout.mesh_device, layout.cores
        self.rows = rows
        self.rope = rope
        self.attend: Callable[..., ttnn.Tensor] = attend
        self.rope_rows = cores.height_sharded(layout.head_dim, cores.in_rows(self.lookups))
        rotation_memory = cores.height_sharded(TILE, cores.in_rows(self.lookups))
        self.rotation = ttnn.from_torch(
            rotation_tile().repeat(self.lookups, 1)[None, None],
            dtype=ttnn.bfloat16,
            layout=ttnn.TILE_LAYOUT,
            device=mesh_device,
            memory_config=rotation_memory,
            mesh_mapper=ttnn.ReplicateTensorToMesh(mesh_device),
        )

    def rope_tables(self, inputs: RowInputs) -> list[ttnn.Tensor]:
        """cos and sin for this forward, looked up once for all layers."""
        return self.rope.rows(inputs.lookups, self.rope_rows)

    def rotate(self, q: ttnn.Tensor, k: ttnn.Tensor, tables: list[ttnn.Tensor]) -> tuple[ttnn.Tensor, ttnn.Tensor]:
        raise NotImplementedError

    def store(self, cache: LayerCache | PagedCache, k: ttnn.Tensor, v: ttnn.Tensor, inputs: RowInputs) -> None:
        raise NotImplementedError


class FusedRowPlan(RowPlan):
    """q on R cores, k on R others: one op rotates both, one op writes k and v."""

    overlap_heads = False

    def __init__(self, rows: int, layout: Layout, rope: RopeTables, attend: PagedRows | TreeRows):
        self.lookups = 2 * rows
        super().__init__(rows, layout, rope, attend)

    def rotate(self, q, k, tables):
        return ttnn.experimental.rotary_embedding_llama_fused_qk(q, k, *tables, self.rotation)

    def store(self, cache, k, v, inputs):
        # share_cache: all rows are of one sequence, and neighbours share a tile, so the cores take turns.
        ttnn.experimental.paged_fused_update_cache(
            cache.keys, k, cache.values, v, update_idxs_tensor=inputs.positions, share_cache=True
        )


class SeparateRowPlan(RowPlan):
    """q, k and v on the same R cores, for grids of fewer than 2 R: two ops more in a layer."""

    overlap_heads = True

    def __init__(self, rows: int, layout: Layout, rope: RopeTables, attend: PagedRows | TreeRows):
        self.lookups = rows
        super().__init__(rows, layout, rope, attend)

    def rotate(self, q, k, tables):
        return tuple(
            ttnn.experimental.rotary_embedding_llama(heads, *tables, self.rotation, is_decode_mode=True)
            for heads in (q, k)
        )

    def store(self, cache, k, v, inputs):
        for kept, new in ((cache.keys, k), (cache.values, v)):
            ttnn.experimental.paged_update_cache(kept, new, update_idxs_tensor=inputs.positions, share_cache=True)


def make_row_plan(rows: int, layout: Layout, rope: RopeTables, *, tree: bool = False) -> RowPlan:
    """The plan with the fewest ops that the grid has cores for."""
    plan = FusedRowPlan if 2 * rows <= layout.cores.count else SeparateRowPlan
    return plan(rows, layout, rope, TreeRows(layout) if tree else CausalRows(rows, layout))
