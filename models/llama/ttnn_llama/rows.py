"""What a decode or verify forward of R rows needs besides weights: its inputs, and the ops that depend on R.

A row is a position of the one sequence: row i stands at position p + i. Rows beyond the tokens given carry position
-1, which the cache update and attention skip.
"""

from collections.abc import Sequence

import torch
import ttnn

from models.llama.ttnn_llama.kv_cache import LayerCache
from models.llama.ttnn_llama.layout import Layout
from models.llama.ttnn_llama.rope import RopeTables, rotation_tile
from models.llama.ttnn_llama.shapes import TILE


class RowInputs:
    """The persistent input buffers of one forward of R rows, and how to fill them.

    ids [1, R] uint32, positions [R] int32 (for cache and attention), lookups [1, m] uint32 (for the rope tables: the
    positions, twice over where q and k are rotated together).
    """

    def __init__(self, rows: int, lookups: int, mesh_device: ttnn.MeshDevice):
        self.rows = rows
        self.repeats = lookups // rows
        self._mapper = ttnn.ReplicateTensorToMesh(mesh_device)
        host = self._host([0], 0)
        self.ids, self.positions, self.lookups = (
            ttnn.to_device(tensor, mesh_device, memory_config=ttnn.DRAM_MEMORY_CONFIG) for tensor in host
        )

    def _host(self, tokens: Sequence[int], position: int) -> list[ttnn.Tensor]:
        count, padding = len(tokens), self.rows - len(tokens)
        where = list(range(position, position + count))
        ids = torch.tensor([[*tokens, *[0] * padding]], dtype=torch.int32)
        positions = torch.tensor([*where, *[-1] * padding], dtype=torch.int32)
        lookups = torch.tensor([[*where, *[0] * padding] * self.repeats], dtype=torch.int32)

        def tensor(values: torch.Tensor, dtype: ttnn.DataType) -> ttnn.Tensor:
            return ttnn.from_torch(values, dtype=dtype, layout=ttnn.ROW_MAJOR_LAYOUT, mesh_mapper=self._mapper)

        return [tensor(ids, ttnn.uint32), tensor(positions, ttnn.int32), tensor(lookups, ttnn.uint32)]

    def fill(self, tokens: Sequence[int], position: int) -> None:
        """Copy tokens [n <= R] standing at position.. to the device, into the same buffers."""
        buffers = (self.ids, self.positions, self.lookups)
        for host, buffer in zip(self._host(tokens, position), buffers, strict=True):
            ttnn.copy_host_to_device_tensor(host, buffer)

    def place(self, position: int) -> None:
        """Set the positions alone, for a forward whose ids are found on the device."""
        _, *hosts = self._host([0] * self.rows, position)
        for host, buffer in zip(hosts, (self.positions, self.lookups), strict=True):
            ttnn.copy_host_to_device_tensor(host, buffer)


class RowPlan:
    """Ops and memory configurations of a forward of exactly R rows; `make_row_plan` chooses the form."""

    overlap_heads: bool
    lookups: int  # rope rows looked up

    def __init__(self, rows: int, layout: Layout, rope: RopeTables):
        mesh_device, cores = layout.mesh_device, layout.cores
        self.rows = rows
        self.rope = rope
        # where nlp_concat_heads_decode wants its input: one position a core, on a rectangle
        self.attended = cores.height_sharded(layout.head_dim, cores.in_rectangle(rows))
        self.rope_rows = cores.height_sharded(layout.head_dim, cores.in_rows(self.lookups))
        rotation_memory = cores.height_sharded(TILE, cores.in_rows(self.lookups))
        mapper = ttnn.ReplicateTensorToMesh(mesh_device)
        self.rotation = ttnn.from_torch(
            rotation_tile().repeat(self.lookups, 1)[None, None],
            dtype=ttnn.bfloat16,
            layout=ttnn.TILE_LAYOUT,
            device=mesh_device,
            memory_config=rotation_memory,
            mesh_mapper=mapper,
        )
        # The whole cache is one block of a paged cache, the same for every row.
        self.page_table = ttnn.from_torch(
            torch.zeros(rows, 1, dtype=torch.int32),
            dtype=ttnn.int32,
            layout=ttnn.ROW_MAJOR_LAYOUT,
            device=mesh_device,
            mesh_mapper=mapper,
        )

    def rope_tables(self, inputs: RowInputs) -> list[ttnn.Tensor]:
        """cos and sin for this forward, looked up once for all layers."""
        return self.rope.rows(inputs.lookups, self.rope_rows)

    def rotate(self, q: ttnn.Tensor, k: ttnn.Tensor, tables: list[ttnn.Tensor]) -> tuple[ttnn.Tensor, ttnn.Tensor]:
        raise NotImplementedError

    def store(self, cache: LayerCache, k: ttnn.Tensor, v: ttnn.Tensor, inputs: RowInputs) -> None:
        raise NotImplementedError


class FusedRowPlan(RowPlan):
    """q on R cores, k on R others: one op rotates both, one op writes k and v."""

    overlap_heads = False

    def __init__(self, rows: int, layout: Layout, rope: RopeTables):
        self.lookups = 2 * rows
        super().__init__(rows, layout, rope)

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

    def __init__(self, rows: int, layout: Layout, rope: RopeTables):
        self.lookups = rows
        super().__init__(rows, layout, rope)

    def rotate(self, q, k, tables):
        return tuple(
            ttnn.experimental.rotary_embedding_llama(heads, *tables, self.rotation, is_decode_mode=True)
            for heads in (q, k)
        )

    def store(self, cache, k, v, inputs):
        for kept, new in ((cache.keys, k), (cache.values, v)):
            ttnn.experimental.paged_update_cache(kept, new, update_idxs_tensor=inputs.positions, share_cache=True)


def make_row_plan(rows: int, layout: Layout, rope: RopeTables) -> RowPlan:
    """The plan with the fewest ops that the grid has cores for."""
    plan = FusedRowPlan if 2 * rows <= layout.cores.count else SeparateRowPlan
    return plan(rows, layout, rope)
