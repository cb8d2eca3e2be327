"""Grouped-query attention over a cache, flat for one sequence or of pages for several.

Decode and verify treat the R positions as rows of a batch that shares one cache: `paged_*update_cache` writes them in
turn (share_cache, or calls one after the other: `batch_rows`), then each attends to what it may see (`attend`).
"""

from collections.abc import Sequence

import ttnn

from models.ttnn_llama.device.collectives import Line, OneChip
from models.ttnn_llama.modules.attend import attention_scale
from models.ttnn_llama.modules.kv_cache import LayerCache, PagedCache
from models.ttnn_llama.modules.layout import Layout, attention_compute_config
from models.ttnn_llama.modules.linear import Linear, SplitLinear
from models.ttnn_llama.modules.rows import RowInputs, RowPlan
from models.ttnn_llama.shapes import KV_BLOCK


class Attention:
    """q|k|v projection, rope, cache, attention and output projection of one layer.

    Args:
        wqkv: [1, 1, H, (Q + 2 KV) D] per chip, q and k columns permuted for interleaved rope. Several: x is given in as
            many parts (`SplitLinear`).
        wo: [1, 1, Q D, H] per chip: its products are summed over the chips.
        cache: of this layer.
    """

    def __init__(
        self,
        wqkv: ttnn.Tensor | Sequence[ttnn.Tensor],
        wo: ttnn.Tensor,
        cache: LayerCache | PagedCache,
        layout: Layout,
        collectives: OneChip | Line,
    ):
        options = {"weight_format": layout.precision.attention, "fidelity": layout.precision.attention_fidelity}
        project = Linear if isinstance(wqkv, ttnn.Tensor) else SplitLinear
        self.wqkv = project(wqkv, layout, in_cores=layout.residual_cores, output=layout.qkv, **options)
        self.wo = Linear(wo, layout, in_cores=layout.heads, output=layout.residual, **options)
        self.cache = cache
        self.collectives = collectives
        self.heads, self.kv_heads = layout.heads, layout.kv_heads
        self.scale = attention_scale(layout.head_dim)
        self.prefill_program = layout.attention_program(q_chunk=KV_BLOCK)
        self.compute = attention_compute_config(layout.mesh_device, exact=True)

    def decode_forward(
        self, x: ttnn.Tensor, tables: list[ttnn.Tensor], inputs: RowInputs, plan: RowPlan
    ) -> ttnn.Tensor:
        """Normed hidden states [1, 1, R, H] -> [1, 1, R, H], both sharded as the residual stream.

        Writes keys and values of the R rows at inputs.positions. tables: cos and sin of the rows.
        """
        q_1RQD = self.store_rows(x, tables, inputs, plan)
        joined = plan.attend(q_1RQD, self.cache, inputs)  # [1, 1, R or 32, Q D]
        output = self.collectives.sum_rows(self.wo.decode_forward(joined))
        # Where heads were concatenated for a whole tile of 32 rows: the first R of them, as a view.
        hidden = output.shape[-1]
        return ttnn.reshape(output, (1, 1, plan.rows, hidden), (1, 1, 32, hidden))

    def store_rows(self, x: ttnn.Tensor, tables: list[ttnn.Tensor], inputs: RowInputs, plan: RowPlan) -> ttnn.Tensor:
        """The part of `decode_forward` that writes the cache: rotated queries [1, R, Q, D]."""
        qkv = self.wqkv.decode_forward(x)
        q_1RQD, k_1RKD, v_1RKD = ttnn.experimental.nlp_create_qkv_heads_decode(
            qkv,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            overlap_qk_coregrid=plan.overlap_heads,
            memory_config=ttnn.L1_HEIGHT_SHARDED_MEMORY_CONFIG,
        )
        ttnn.deallocate(qkv)
        q_1RQD, k_1RKD = plan.rotate(q_1RQD, k_1RKD, tables)
        plan.store(self.cache, k_1RKD, v_1RKD, inputs)
        return q_1RQD

    def prefill_forward(self, x: ttnn.Tensor, tables: list[ttnn.Tensor], rotation: ttnn.Tensor, start: int):
        """Normed hidden states [1, 1, m, H] of positions start..start+m-1 -> [1, 1, m, H], in DRAM.

        start and m are multiples of 128; the cache holds all positions before start. rotation: the 32 x 32 tile.
        """
        q = self.store_prefill(x, tables, rotation, start)
        attended = ttnn.transformer.chunked_scaled_dot_product_attention(
            q,
            self.cache.keys,
            self.cache.values,
            self.cache.page_table,
            **self.cache.chunk_start(start),
            scale=self.scale,
            program_config=self.prefill_program,
            compute_kernel_config=self.compute,
        )
        ttnn.deallocate(q)
        joined = ttnn.experimental.nlp_concat_heads(attended)  # [1, 1, m, Q D]
        return self.collectives.sum_prefill(self.wo.prefill_forward(joined))

    def store_prefill(self, x: ttnn.Tensor, tables: list[ttnn.Tensor], rotation: ttnn.Tensor, start: int):
        """The part of `prefill_forward` that writes the cache: rotated queries [1, Q, m, D]."""
        qkv = self.wqkv.prefill_forward(x)
        q, k, v = ttnn.experimental.nlp_create_qkv_heads(
            qkv,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            transpose_k_heads=False,
            memory_config=ttnn.DRAM_MEMORY_CONFIG,
        )  # [1, Q, m, D], [1, KV, m, D] twice
        ttnn.deallocate(qkv)
        q, k = (ttnn.experimental.rotary_embedding_llama(heads, *tables, rotation) for heads in (q, k))
        self.cache.fill(ttnn.typecast(k, self.cache.dtype), ttnn.typecast(v, self.cache.dtype), start)
        for heads in (k, v):
            ttnn.deallocate(heads)
        return q
