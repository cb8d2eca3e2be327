"""The KV cache: one flat pair of tensors a layer, for one sequence."""

import torch
import ttnn

from models.ttnn_llama.modules.layout import Layout
from models.ttnn_llama.weights.precision import ttnn_dtype


class LayerCache:
    """keys and values [1, KV, S, D] of one layer (per chip), and the page table [1, 1] that makes them one block.

    They start as zeros: what attention masks it still multiplies, and 0 times what DRAM held before may be no number.
    """

    def __init__(self, layout: Layout, page_table: ttnn.Tensor):
        shape = (1, layout.kv_heads, layout.cache_length, layout.head_dim)
        self.dtype = ttnn_dtype(layout.precision.kv_cache)
        self.page_table = page_table
        self.keys, self.values = (
            ttnn.zeros(
                shape,
                dtype=self.dtype,
                layout=ttnn.TILE_LAYOUT,
                device=layout.mesh_device,
                memory_config=ttnn.DRAM_MEMORY_CONFIG,
            )
            for _ in range(2)
        )

    def fill(self, k: ttnn.Tensor, v: ttnn.Tensor, start: int) -> None:
        """Write k and v [1, KV, m, D] of a prefill at positions start.., a multiple of 32."""
        for kept, new in ((self.keys, k), (self.values, v)):
            ttnn.fill_cache(kept, new, 0, update_idx=start)


def make_cache(layout: Layout) -> list[LayerCache]:
    """One LayerCache for each layer."""
    page_table = ttnn.from_torch(
        torch.zeros(1, 1, dtype=torch.int32),
        dtype=ttnn.int32,
        layout=ttnn.ROW_MAJOR_LAYOUT,
        device=layout.mesh_device,
        mesh_mapper=ttnn.ReplicateTensorToMesh(layout.mesh_device),
    )
    return [LayerCache(layout, page_table) for _ in range(layout.config.num_hidden_layers)]
