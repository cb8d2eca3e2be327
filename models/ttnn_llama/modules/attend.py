"""How R rows attend: as positions one behind the other, to a flat cache [1, KV, S, D] or to pages, or as a tree.

All give the heads' results of all rows side by side, [1, 1, R or 32, Q D], one head a core, as `wo` wants them.

Cost per layer and chip, by the kernels' sources: causal rows stream keys and values up to their position once for each
row, each on a core of its own for each KV head; rows of a tree stream them once for each query head (of Q / KV that
share a KV head), on Q cores, for up to 32 rows alike. So a tree of 32 rows reads 8 to 11 times less than 32 causal rows
do, and one of few rows no less; on 8 chips, where Q is 3 or 4, few cores do it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy
import torch
import ttnn

from models.ttnn_llama.modules.kv_cache import LayerCache, PagedCache
from models.ttnn_llama.modules.layout import Layout, attention_compute_config
from models.ttnn_llama.shapes import TILE

if TYPE_CHECKING:
    from models.ttnn_llama.modules.batch_rows import BatchInputs
    from models.ttnn_llama.modules.rows import RowInputs, TreeInputs


def attention_scale(head_dim: int) -> float:
    """1 / sqrt(D) as a number that float32 holds: chunked attention takes no double."""
    return float(numpy.float32(head_dim**-0.5))


class PagedRows:
    """Each row sees all up to its own position, in the pages that its row of `batch_rows.BatchInputs.tables` names."""

    def __init__(self, rows: int, layout: Layout):
        cores = layout.cores
        self.heads = layout.heads
        self.scale = attention_scale(layout.head_dim)
        self.program = layout.attention_program(q_chunk=TILE)
        self.compute = attention_compute_config(layout.mesh_device, exact=False)
        # where nlp_concat_heads_decode wants its input: one position a core, on a rectangle
        self.attended = cores.height_sharded(layout.head_dim, cores.in_rectangle(rows))

    def tables(self, inputs: RowInputs) -> ttnn.Tensor:
        """The page table of each row, [R, pages]."""
        return cast("BatchInputs", inputs).tables

    def __call__(self, q_1RQD: ttnn.Tensor, cache: LayerCache | PagedCache, inputs: RowInputs) -> ttnn.Tensor:
        """[1, 1, 32, Q D]: heads are concatenated for a whole tile of rows."""
        attended_1RQD = ttnn.transformer.paged_scaled_dot_product_attention_decode(
            q_1RQD,
            cache.keys,
            cache.values,
            self.tables(inputs),
            cur_pos_tensor=inputs.positions,
            scale=self.scale,
            program_config=self.program,
            compute_kernel_config=self.compute,
            memory_config=ttnn.L1_MEMORY_CONFIG,
        )
        attended_1RQD = ttnn.interleaved_to_sharded(attended_1RQD, self.attended)
        return ttnn.experimental.nlp_concat_heads_decode(attended_1RQD, num_heads=self.heads)


class CausalRows(PagedRows):
    """Each row sees all up to its own position, in a flat cache.

    Paged attention reads the flat cache as one block of S positions through a page table of R equal rows: unpaged
    attention with share_cache returns one row only in ttnn 0.81.1 (tt-metal PR 50149).
    """

    def __init__(self, rows: int, layout: Layout):
        super().__init__(rows, layout)
        self.page_table = ttnn.from_torch(
            torch.zeros(rows, 1, dtype=torch.int32),
            dtype=ttnn.int32,
            layout=ttnn.ROW_MAJOR_LAYOUT,
            device=layout.mesh_device,
            mesh_mapper=ttnn.ReplicateTensorToMesh(layout.mesh_device),
        )

    def tables(self, inputs: RowInputs) -> ttnn.Tensor:
        """Zeros [R, 1]: all rows have the one block."""
        return self.page_table


class TreeRows:
    """Each row sees what the mask of `rows.TreeInputs` says.

    The rows are one chunk of queries of a prefill's attention, which takes a mask that all heads share and a map of
    the blocks that the mask leaves visible. Decode attention could do it too, but wants a mask [R, 1, Q, S], reads the
    whole cache whatever is hidden, and that R times.
    """

    def __init__(self, layout: Layout):
        self.scale = attention_scale(layout.head_dim)
        self.program = layout.attention_program(q_chunk=TILE)
        self.compute = attention_compute_config(layout.mesh_device, exact=True)
        cores = layout.cores
        self.joined = cores.width_sharded(layout.heads * layout.head_dim, cores.in_rows(layout.heads))

    def __call__(self, q_1RQD: ttnn.Tensor, cache: LayerCache, inputs: TreeInputs) -> ttnn.Tensor:
        """[1, 1, R, Q D]."""
        q_1QRD = ttnn.transpose(q_1RQD, 1, 2, memory_config=ttnn.L1_MEMORY_CONFIG)
        joined = ttnn.transformer.scaled_dot_product_attention(
            q_1QRD,
            cache.keys,
            cache.values,
            attn_mask=inputs.mask,
            attn_mask_block_map=inputs.blocks,
            is_causal=False,
            scale=self.scale,
            program_config=self.program,
            compute_kernel_config=self.compute,
            memory_config=ttnn.L1_MEMORY_CONFIG,
            output_concat_heads=True,
        )
        return ttnn.interleaved_to_sharded(joined, self.joined)
