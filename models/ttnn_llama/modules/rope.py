"""Rotary position embedding: tables on the device, and the rows of them that a forward needs.

`rotary_embedding_llama` rotates neighbouring columns (2i, 2i+1), so the q and k weights are permuted when they are
converted (`weights`), and every angle stands twice in a row of the tables.
"""

import torch
import ttnn

from models.llama.config import LlamaConfig
from models.llama.rope import inverse_frequencies


def interleaved_tables(config: LlamaConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, both [length, D] fp32: the angle of pair i in columns 2i and 2i+1."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse_frequencies(config))
    return angles.cos().repeat_interleave(2, dim=-1), angles.sin().repeat_interleave(2, dim=-1)


def rotation_tile() -> torch.Tensor:
    """[32, 32]: x @ tile = (-x1, x0, -x3, x2, ...)."""
    tile = torch.zeros(32, 32)
    even = torch.arange(0, 32, 2)
    tile[even, even + 1] = 1.0
    tile[even + 1, even] = -1.0
    return tile


class RopeTables:
    """cos and sin of all positions: row-major for lookups by position (decode), tiled for ranges (prefill)."""

    def __init__(self, config: LlamaConfig, length: int, mesh_device: ttnn.MeshDevice):
        def put(table: torch.Tensor, layout: ttnn.Layout) -> ttnn.Tensor:
            return ttnn.from_torch(
                table,
                dtype=ttnn.bfloat16,
                layout=layout,
                device=mesh_device,
                memory_config=ttnn.DRAM_MEMORY_CONFIG,
                mesh_mapper=ttnn.ReplicateTensorToMesh(mesh_device),
            )

        self.head_dim = config.head_dim
        tables = interleaved_tables(config, length)
        self.lookup = [put(table, ttnn.ROW_MAJOR_LAYOUT) for table in tables]  # [S, D]
        self.ranges = [put(table[None, None], ttnn.TILE_LAYOUT) for table in tables]  # [1, 1, S, D]
        self.rotation = put(rotation_tile()[None, None], ttnn.TILE_LAYOUT)  # [1, 1, 32, 32]

    def rows(self, positions: ttnn.Tensor, memory: ttnn.MemoryConfig) -> list[ttnn.Tensor]:
        """cos and sin [1, m, 1, D], one position a core, for positions [1, m] uint32."""
        found = [ttnn.embedding(positions, table, layout=ttnn.TILE_LAYOUT) for table in self.lookup]  # [1, m, D]
        return [ttnn.transpose(ttnn.unsqueeze_to_4D(table), 1, 2, memory_config=memory) for table in found]

    def chunk(self, positions: ttnn.Tensor) -> list[ttnn.Tensor]:
        """cos and sin [1, 1, m, D], in DRAM, for positions [1, m] uint32: as `range` by a lookup."""
        return [
            ttnn.unsqueeze_to_4D(ttnn.embedding(positions, table, layout=ttnn.TILE_LAYOUT)) for table in self.lookup
        ]

    def range(self, start: int, count: int) -> list[ttnn.Tensor]:
        """cos and sin [1, 1, count, D] of positions start.., both multiples of 32."""
        return [ttnn.slice(table, [0, 0, start, 0], [1, 1, start + count, self.head_dim]) for table in self.ranges]
