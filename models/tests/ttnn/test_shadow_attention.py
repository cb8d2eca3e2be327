"""Shadow values: KV caches and attention over them, against plain torch."""

import pytest
import torch
import ttnn

from models.tests.ttnn.shadow_fixtures import BF8, BF16, KV, POSITIONS, B, D, Q, S, attend, bf16, height_sharded

# ---- KV cache -------------------------------------------------------------------------------------------------------


def written(cache, x, positions):
    """[1, KV, S, D] with the rows of x [1, B, KV, D] at their positions."""
    cache = cache.clone()
    for row, position in enumerate(positions.tolist()):
        if position >= 0:
            cache[0, :, position] = x[0, row]
    return cache


@pytest.mark.parametrize("dtype", [BF16, BF8], ids=str)
def test_paged_update_cache_writes_rows_of_one_shared_cache(put, same, shadow, dtype):
    cache, x = shadow.rounded(bf16(1, KV, S, D), dtype), bf16(1, B, KV, D)
    tensor, rows = put(cache, dtype), put(x, memory_config=height_sharded(B, 32, D))
    ttnn.experimental.paged_update_cache(tensor, rows, update_idxs_tensor=put(POSITIONS), share_cache=True)
    same(tensor, written(cache, shadow.rounded(x, dtype), POSITIONS), 0)


def test_paged_update_cache_takes_positions_as_a_list(put, same):
    cache, x = bf16(B, KV, S, D), bf16(1, B, KV, D)
    tensor, rows = put(cache), put(x, memory_config=height_sharded(B, 32, D))
    ttnn.experimental.paged_update_cache(tensor, rows, update_idxs=[3, 1, 4, 1, 5])
    expected = cache.clone()
    for row, position in enumerate([3, 1, 4, 1, 5]):
        expected[row, :, position] = x[0, row]
    same(tensor, expected, 0)


def test_paged_update_cache_follows_the_page_table(put, same):
    cache, x = bf16(8, KV, 32, D), bf16(1, 2, KV, D)
    table, positions = torch.tensor([[5, 2, 0, 1], [7, 3, 4, 6]]), torch.tensor([40, 70])
    tensor, rows = put(cache), put(x, memory_config=height_sharded(2, 32, D))
    ttnn.experimental.paged_update_cache(tensor, rows, update_idxs_tensor=put(positions), page_table=put(table))
    expected = cache.clone()
    expected[2, :, 8], expected[4, :, 6] = x[0, 0], x[0, 1]
    same(tensor, expected, 0)


def test_rows_that_race_for_one_tile_of_a_paged_cache_are_an_error(put):
    rows = put(bf16(1, 2, KV, D), memory_config=height_sharded(2, 32, D))
    table, positions = torch.tensor([[5, 2], [5, 2]]), torch.tensor([40, 41])
    with pytest.raises(ValueError, match="row 1 writes into a tile"):
        ttnn.experimental.paged_update_cache(
            put(bf16(8, KV, 32, D)), rows, update_idxs_tensor=put(positions), page_table=put(table)
        )


def test_paged_fused_update_cache_writes_both_caches(put, same, mesh_device):
    caches, x = (bf16(1, KV, S, D), bf16(1, KV, S, D)), (bf16(1, B, KV, D), bf16(1, B, KV, D))
    configs = [
        ttnn.MemoryConfig(
            ttnn.TensorMemoryLayout.HEIGHT_SHARDED,
            ttnn.BufferType.L1,
            ttnn.ShardSpec(
                ttnn.CoreRangeSet({ttnn.CoreRange(ttnn.CoreCoord(0, y), ttnn.CoreCoord(B - 1, y))}),
                (32, D),
                ttnn.ShardOrientation.ROW_MAJOR,
            ),
        )
        for y in (0, 1)
    ]
    tensors = [put(cache) for cache in caches]
    rows = [put(part, memory_config=config) for part, config in zip(x, configs, strict=True)]
    ttnn.experimental.paged_fused_update_cache(
        tensors[0], rows[0], tensors[1], rows[1], update_idxs_tensor=put(POSITIONS), share_cache=True
    )
    for tensor, cache, part in zip(tensors, caches, x, strict=True):
        same(tensor, written(cache, part, POSITIONS), 0)


def test_indexed_fused_update_cache_writes_rows_and_skips(put, same):
    caches, x = (bf16(1, KV, S, D), bf16(1, KV, S, D)), (bf16(1, B, KV, D), bf16(1, B, KV, D))
    k, v = (put(cache) for cache in caches)
    rows = [put(part.transpose(1, 2).contiguous()) for part in x]
    ttnn.experimental.indexed_fused_update_cache(k, rows[0], v, rows[1], put(POSITIONS[None]))
    for tensor, cache, part in zip((k, v), caches, x, strict=True):
        same(tensor, written(cache, part, POSITIONS), 0)


def test_fill_cache_writes_at_an_offset(put, same):
    cache, x = bf16(2, KV, S, D), bf16(1, KV, 64, D)
    tensor = put(cache)
    ttnn.fill_cache(tensor, put(x), 1, update_idx=32)
    expected = cache.clone()
    expected[1, :, 32:96] = x[0]
    same(tensor, expected, 0)


def test_paged_fill_cache_fills_pages(put, same):
    cache, x, table = bf16(8, KV, 32, D), bf16(1, KV, 64, D), torch.tensor([[5, 2, 0], [7, 3, 4]])
    tensor = put(cache)
    ttnn.experimental.paged_fill_cache(tensor, put(x), put(table), batch_idx=1)
    expected = cache.clone()
    expected[7], expected[3] = x[0, :, :32], x[0, :, 32:]
    same(tensor, expected, 0)


def test_plus_one_counts_in_place(put, same):
    tensor = put(torch.tensor([3, -1, 7]))
    ttnn.plus_one(tensor)
    same(tensor, torch.tensor([4, 0, 8]), 0)
    tensor = put(torch.tensor([3, -1, 7]))
    ttnn.plus_one(tensor, skip_negative_entries=True)
    same(tensor, torch.tensor([4, -1, 8]), 0)


# ---- attention ------------------------------------------------------------------------------------------------------


def test_attention_over_a_sequence_equals_torch(put, same):
    q, k, v = bf16(1, Q, 64, D), bf16(1, KV, 64, D), bf16(1, KV, 64, D)
    tensors = put(q), put(k), put(v)
    causal = attend(q, k, v, causal=True)
    same(ttnn.transformer.scaled_dot_product_attention(*tensors, is_causal=True), causal, 0.02)
    joined = ttnn.transformer.scaled_dot_product_attention(*tensors, is_causal=True, output_concat_heads=True)
    same(joined, causal.transpose(1, 2).reshape(1, 1, 64, Q * D), 0.02)


def test_attention_with_a_mask_over_a_cache_equals_torch(put, same):
    q, k, v = bf16(1, Q, B, D), bf16(1, KV, S, D), bf16(1, KV, S, D)
    mask = torch.where(torch.rand(1, 1, B, S) < 0.5, 0.0, -1e9).bfloat16().float()
    y = ttnn.transformer.scaled_dot_product_attention(put(q), put(k), put(v), attn_mask=put(mask), is_causal=False)
    same(y, attend(q, k, v, mask.expand(1, Q, B, S)), 0.02)


def test_attention_with_a_mask_of_its_own_for_each_head_equals_torch(put, same):
    q, k, v = bf16(1, Q, B, D), bf16(1, KV, S, D), bf16(1, KV, S, D)
    mask = torch.where(torch.rand(1, Q, B, S) < 0.5, 0.0, -1e9).bfloat16().float()
    y = ttnn.transformer.scaled_dot_product_attention(put(q), put(k), put(v), attn_mask=put(mask), is_causal=False)
    same(y, attend(q, k, v, mask), 0.02)


def test_attention_leaves_out_the_blocks_that_its_map_names(put, same):
    """Also where the mask would show them: what is there is not read."""
    q, k, v = bf16(1, Q, B, D), bf16(1, KV, 3 * 128, D), bf16(1, KV, 3 * 128, D)
    mask = torch.where(torch.rand(1, 1, B, 3 * 128) < 0.5, 0.0, -(2.0**30))
    chunks = ttnn.SDPAProgramConfig(
        compute_with_storage_grid_size=ttnn.CoreCoord(8, 7), q_chunk_size=32, k_chunk_size=128
    )

    def attended(*blocks):
        return ttnn.transformer.scaled_dot_product_attention(
            *(put(x) for x in (q, k, v)),
            attn_mask=put(mask),
            attn_mask_block_map=put(torch.tensor([[[blocks]]])),
            is_causal=False,
            program_config=chunks,
        )

    read = torch.cat((torch.arange(128), torch.arange(256, 384)))
    expected = attend(q, k[:, :, read], v[:, :, read], mask[..., read].expand(1, Q, B, 256))
    same(attended(1, 0, 1), expected, 0.02)
    same(attended(1, 1, 1), attend(q, k, v, mask.expand(1, Q, B, 384)), 0.02)
    with pytest.raises(ValueError, match="a row whose every block is left out has no value"):
        attended(0, 0, 0)


def test_what_a_mask_hides_does_not_change_a_bit(put, shadow):
    """Weights of 0 are no part of a sum: a row attends like one that has only what it sees."""
    q, k, v = bf16(1, Q, B, D), bf16(1, KV, S, D), bf16(1, KV, S, D)
    seen = torch.randperm(S)[: S // 3].sort().values
    mask = torch.full((1, 1, B, S), -(2.0**30)).index_fill(3, seen, 0.0)
    options = {"is_causal": False, "attn_mask": put(mask)}
    masked = ttnn.transformer.scaled_dot_product_attention(*(put(x) for x in (q, k, v)), **options)
    options["attn_mask"] = put(torch.zeros(1, 1, B, len(seen)))
    few = ttnn.transformer.scaled_dot_product_attention(put(q), put(k[:, :, seen]), put(v[:, :, seen]), **options)
    assert torch.equal(shadow.value(masked)[0], shadow.value(few)[0])


def test_decode_attention_sees_its_position_and_leaves_rows_of_negative_ones_unwritten(put, shadow):
    q, k, v = bf16(1, B, Q, D), bf16(1, KV, S, D), bf16(1, KV, S, D)
    table = put(torch.zeros(B, 1, dtype=torch.int64))  # the whole cache as one page of all rows
    y = ttnn.transformer.paged_scaled_dot_product_attention_decode(
        put(q), put(k), put(v), table, cur_pos_tensor=put(POSITIONS)
    )
    expected = torch.full_like(q, float("nan"))
    for row, position in enumerate(POSITIONS.tolist()):
        if position >= 0:
            seen = slice(0, position + 1)
            expected[0, row] = attend(q[:, row, :, None], k[:, :, seen], v[:, :, seen])[0, :, 0]
    torch.testing.assert_close(shadow.value(y)[0], expected, rtol=0.02, atol=0.02, equal_nan=True)


def test_decode_attention_follows_the_page_table(put, same):
    q, k, v = bf16(1, 2, Q, D), bf16(8, KV, 32, D), bf16(8, KV, 32, D)
    table, positions = torch.tensor([[5, 2, 0, 1], [7, 3, 4, 6]]), [40, 70]
    y = ttnn.transformer.paged_scaled_dot_product_attention_decode(
        put(q), put(k), put(v), put(table), cur_pos_tensor=put(torch.tensor(positions))
    )
    expected = torch.zeros_like(q)
    for row, position in enumerate(positions):
        keys, values = (torch.cat([x[page] for page in table[row]], 1)[None, :, : position + 1] for x in (k, v))
        expected[0, row] = attend(q[:, row, :, None], keys, values)[0, :, 0]
    same(y, expected, 0.02)


def test_decode_attention_with_a_mask_gives_each_row_its_own(put, same):
    q, k, v = bf16(1, B, Q, D), bf16(1, KV, S, D), bf16(1, KV, S, D)
    mask = torch.where(torch.rand(B, 1, 1, S) < 0.5, 0.0, -1e9).bfloat16().float().expand(B, 1, Q, S).contiguous()
    table = put(torch.zeros(B, 1, dtype=torch.int64))
    y = ttnn.transformer.paged_scaled_dot_product_attention_decode(
        put(q), put(k), put(v), table, is_causal=False, attn_mask=put(mask)
    )
    expected = torch.stack([attend(q[:, r, :, None], k, v, mask[r].transpose(0, 1))[0, :, 0] for r in range(B)])[None]
    same(y, expected, 0.02)
    with pytest.raises(ValueError, match="first dimension"):  # accepted by ttnn, which takes row 0's mask for all
        ttnn.transformer.paged_scaled_dot_product_attention_decode(
            put(q), put(k), put(v), table, is_causal=False, attn_mask=put(mask.transpose(0, 1).contiguous())
        )


def test_decode_attention_folds_positions_of_one_kv_head_into_tiles(put, same, mesh_device):
    rows, q, k, v = 4, bf16(1, 4, 32, D), bf16(1, 1, S, D), bf16(1, 1, S, D)
    positions = [40, 41, 42, 43]
    program = ttnn.SDPAProgramConfig(
        compute_with_storage_grid_size=mesh_device.compute_with_storage_grid_size(), q_chunk_size=32, k_chunk_size=64
    )
    y = ttnn.transformer.paged_scaled_dot_product_attention_decode(
        ttnn.reshape(put(q), (1, 1, 32 * rows, D), (1, 1, 32 * rows, D)),
        put(k),
        put(v),
        put(torch.zeros(1, 1, dtype=torch.int64)),
        cur_pos_tensor=put(torch.tensor(positions)),
        program_config=program,
        spec_multi_pos_tiles=rows,
    )
    expected = [attend(q[:, r, :, None], k[:, :, : p + 1], v[:, :, : p + 1])[0, :, 0] for r, p in enumerate(positions)]
    same(y, torch.cat(expected)[None, None], 0.02)


@pytest.mark.parametrize("start_as_tensor", [False, True])
def test_chunked_attention_sees_the_cache_up_to_each_row(put, same, start_as_tensor, mesh_device):
    q, k, v = bf16(1, Q, 64, D), bf16(1, KV, 256, D), bf16(1, KV, 256, D)
    program = ttnn.SDPAProgramConfig(
        compute_with_storage_grid_size=mesh_device.compute_with_storage_grid_size(), q_chunk_size=64, k_chunk_size=64
    )
    # The whole cache as one page. With a tensor for the start, ttnn wants rows of 32 bytes; it reads the first entry.
    table = put(torch.zeros(1, 8 if start_as_tensor else 1, dtype=torch.int64))
    start = {"chunk_start_idx_tensor": put(torch.tensor([128]))} if start_as_tensor else {"chunk_start_idx": 128}
    y = ttnn.transformer.chunked_scaled_dot_product_attention(
        put(q), put(k), put(v), table, program_config=program, **start
    )
    mask = torch.arange(256) <= torch.arange(128, 192)[:, None]
    same(y, attend(q, k, v, mask), 0.02)
