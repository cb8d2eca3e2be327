"""Golden functions of what writes a KV cache or positions: into their first argument. Conventions as of `goldens`."""

import ttnn

TILE = ttnn.TILE_SIZE


def paged_update_cache(
    cache_tensor,
    input_tensor,
    *,
    update_idxs=(),
    update_idxs_tensor=None,
    share_cache=False,
    page_table=None,
    batch_offset=0,
):
    """Row b of x [1, B, KV, D] goes to position update_idxs[b], -1: nowhere.

    The cache is [B, KV, S, D], [1, KV, S, D] with share_cache, or [blocks, KV, block, D] with a page table [B, n].

    Raises:
        ValueError: two rows go to one tile of a paged cache. Each is written by a core of its own that reads, changes
            and writes back the whole tile, in no order.
    """
    positions = update_idxs if update_idxs_tensor is None else update_idxs_tensor.flatten().tolist()
    kv_heads, block = cache_tensor.shape[1:3]
    written = set()
    for row, position in enumerate(positions):
        if position < 0:
            continue
        page = 0 if share_cache else row + batch_offset
        if page_table is not None:
            page, position = int(page_table[row, position // block]), position % block
            if (page, position // TILE) in written:
                raise ValueError(f"paged_update_cache: row {row} writes into a tile that another row writes into too")
            written.add((page, position // TILE))
        cache_tensor[page, :, position] = input_tensor[0, row, :kv_heads]


def paged_fused_update_cache(cache_tensor1, input_tensor1, cache_tensor2, input_tensor2, **options):
    paged_update_cache(cache_tensor1, input_tensor1, **options)
    paged_update_cache(cache_tensor2, input_tensor2, **options)


def indexed_fused_update_cache(cache_tensor1, input_tensor1, cache_tensor2, input_tensor2, physical_update_idxs_tensor):
    """Row r of x [1, KV, R, D] goes to position idx[r] of the cache [blocks, KV, block, D] end to end, -1: nowhere."""
    index = physical_update_idxs_tensor.flatten()[: input_tensor1.shape[2]].long()
    rows = (index >= 0).nonzero().flatten()
    for cache, x in ((cache_tensor1, input_tensor1), (cache_tensor2, input_tensor2)):
        block = cache.shape[2]
        cache[index[rows] // block, :, index[rows] % block] = x[0, :, rows].transpose(0, 1)


def paged_fill_cache(cache_tensor, input_tensor, page_table, *, batch_idx=0, batch_idx_tensor=None):
    """x [1, KV, S, D] fills the pages of page_table[batch_idx] from the first one on."""
    batch_idx = batch_idx if batch_idx_tensor is None else int(batch_idx_tensor.flatten()[0])
    block = cache_tensor.shape[2]
    for i, part in enumerate(input_tensor[0].split(block, 1)):
        page = int(page_table[batch_idx, i])
        if page >= 0:
            cache_tensor[page, :, : part.shape[1]] = part


def fill_cache(cache_tensor, input_tensor, batch_idx, *, update_idx=0):
    """x [1, KV, S, D] goes to positions update_idx.. of cache[batch_idx]."""
    cache_tensor[batch_idx, :, update_idx : update_idx + input_tensor.shape[2]] = input_tensor[0]


def update_cache(cache, input, update_idx, batch_offset=0):
    """x [1, KV, B, D]: one position of each sequence of the cache [B, KV, S, D]."""
    batch = min(cache.shape[0], input.shape[2] - batch_offset)
    cache[:batch, :, update_idx] = input[0, :, batch_offset : batch_offset + batch].transpose(0, 1)


def plus_one(input_tensor, sub_core_grids=None, skip_negative_entries=False):
    input_tensor += (input_tensor >= 0) if skip_negative_entries else 1


def copy(input_a, input_b):
    input_b.copy_(input_a)
