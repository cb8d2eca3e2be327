"""The KV cache: for one sequence a flat pair of tensors a layer, for several a pair of tensors of pages."""

from collections.abc import Sequence

import torch
import ttnn

from models.ttnn_llama.modules.layout import Layout
from models.ttnn_llama.shapes import KV_BLOCK, PREFILL_CHUNK, pages_of
from models.ttnn_llama.weights.precision import ttnn_dtype

TABLE_UNIT = 8  # page tables of chunked attention have 32 bytes, or multiples of that


class LayerCache:
    """keys and values [1, KV, S, D] of one layer (per chip), and the page table [1, 1] that makes them one block.

    They start as zeros: what attention masks it still multiplies, and 0 times what DRAM held before may be no number.
    """

    def __init__(self, layout: Layout, page_table: ttnn.Tensor):
        self.dtype = ttnn_dtype(layout.precision.kv_cache)
        self.page_table = page_table
        self.keys, self.values = _zeros((1, layout.kv_heads, layout.cache_length, layout.head_dim), layout)

    def fill(self, k: ttnn.Tensor, v: ttnn.Tensor, start: int) -> None:
        """Write k and v [1, KV, m, D] of a prefill at positions start.., a multiple of 32."""
        for kept, new in ((self.keys, k), (self.values, v)):
            ttnn.fill_cache(kept, new, 0, update_idx=start)

    @staticmethod
    def chunk_start(start: int) -> dict[str, int]:
        """How chunked attention is told where a chunk begins."""
        return {"chunk_start_idx": start}


class PromptPages:
    """Where the chunk of a prompt lies that is being read, in buffers that stay.

    sequence [1, W]: all pages of its sequence. chunk [1, up to 8]: those that it is written to, -1 where it writes
    nothing. start [1]: the position of its first token.

    So a chunk's programs depend on its length alone, wherever it begins.
    """

    def __init__(self, layout: Layout, pages: int):
        width = min(pages_of(layout.cache_length), pages)  # ttnn fills by no table wider than the pool
        self._width = -(-width // TABLE_UNIT) * TABLE_UNIT
        self._chunk = min(PREFILL_CHUNK // KV_BLOCK, width)
        self._mapper = ttnn.ReplicateTensorToMesh(layout.mesh_device)
        self.sequence, self.chunk, self.start = (
            ttnn.to_device(host, layout.mesh_device, memory_config=ttnn.DRAM_MEMORY_CONFIG)
            for host in (self._host([], self._width, 0), self._host([], self._chunk), self._numbers([0]))
        )

    def place(self, pages: Sequence[int], start: int) -> None:
        """Before a chunk at positions start.., a multiple of 128, of a sequence with these pages."""
        ttnn.copy_host_to_device_tensor(self._host(pages, self._width, 0), self.sequence)
        first = start // KV_BLOCK
        ttnn.copy_host_to_device_tensor(self._host(pages[first : first + self._chunk], self._chunk), self.chunk)
        ttnn.copy_host_to_device_tensor(self._numbers([start]), self.start)

    def _host(self, pages: Sequence[int], width: int, padding: int = -1) -> ttnn.Tensor:
        return self._numbers([[*pages, *[padding] * (width - len(pages))]])

    def _numbers(self, values: list) -> ttnn.Tensor:
        numbers = torch.tensor(values, dtype=torch.int32)
        return ttnn.from_torch(numbers, dtype=ttnn.int32, layout=ttnn.ROW_MAJOR_LAYOUT, mesh_mapper=self._mapper)


class PagedCache:
    """keys and values [P, KV, 128, D] of one layer (per chip): pages of any number of sequences.

    They start as zeros, as `LayerCache` does.
    """

    def __init__(self, layout: Layout, pages: int, prompt: PromptPages):
        self.dtype = ttnn_dtype(layout.precision.kv_cache)
        self._prompt = prompt
        self.page_table = prompt.sequence
        self.keys, self.values = _zeros((pages, layout.kv_heads, KV_BLOCK, layout.head_dim), layout)

    def fill(self, k: ttnn.Tensor, v: ttnn.Tensor, start: int) -> None:
        """Write k and v [1, KV, m, D] of a prefill to the pages that `PromptPages.place` has set for its start."""
        for kept, new in ((self.keys, k), (self.values, v)):
            ttnn.experimental.paged_fill_cache(kept, new, self._prompt.chunk, batch_idx=0)

    def chunk_start(self, start: int) -> dict[str, ttnn.Tensor]:
        """How chunked attention is told where a chunk begins, which `PromptPages.place` has set."""
        return {"chunk_start_idx_tensor": self._prompt.start}


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


def _zeros(shape: tuple[int, ...], layout: Layout) -> tuple[ttnn.Tensor, ttnn.Tensor]:
    """Two of them, in DRAM, in the cache's format."""
    keys, values = (
        ttnn.zeros(
            shape,
            dtype=ttnn_dtype(layout.precision.kv_cache),
            layout=ttnn.TILE_LAYOUT,
            device=layout.mesh_device,
            memory_config=ttnn.DRAM_MEMORY_CONFIG,
        )
        for _ in range(2)
    )
    return keys, values
