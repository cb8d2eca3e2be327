"""Golden functions of attention: heads, rotary embedding, attention over tensors and pages. Conventions as of
`goldens`."""

import torch
import ttnn

TILE = ttnn.TILE_SIZE
UNWRITTEN = float("nan")  # what a kernel leaves as it was
HIDDEN = -1e6  # what is added to a score that leaves no weight beside others: far less than exp can tell from 0


# ---- heads and rotary embedding -------------------------------------------------------------------------------------


def nlp_create_qkv_heads(input, input_kv=None, *, num_heads, num_kv_heads=None, transpose_k_heads=True):
    """[B, 1, S, (Q + 2 KV) D] -> [B, Q, S, D], [B, KV, S, D] (or [B, KV, D, S]), [B, KV, S, D]."""
    x = input if input_kv is None else torch.cat((input, input_kv), -1)
    kv_heads = num_kv_heads or num_heads
    heads = x.reshape(x.shape[0], x.shape[2], num_heads + 2 * kv_heads, -1).transpose(1, 2)
    q, k, v = heads.split((num_heads, kv_heads, kv_heads), 1)
    return q, k.mT if transpose_k_heads else k, v


def nlp_create_qkv_heads_decode(input_tensor, *, num_heads, num_kv_heads=None, overlap_qk_coregrid=None):
    """[1, 1, B, (Q + 2 KV) D] -> [1, B, Q, D], [1, B, KV, D], [1, B, KV, D]."""
    kv_heads = num_kv_heads or num_heads
    heads = input_tensor.reshape(1, input_tensor.shape[2], num_heads + 2 * kv_heads, -1)
    return heads.split((num_heads, kv_heads, kv_heads), 2)


def nlp_concat_heads(input):
    """[B, Q, S, D] -> [B, 1, S, Q D]."""
    return input.transpose(1, 2).flatten(2)[:, None]


def nlp_concat_heads_decode(input_tensor, *, num_heads, inferred_shape):
    """[1, B, Q, D] -> [1, 1, 32, Q D]: the operation always returns a whole tile of rows, and writes B of them."""
    y = input_tensor.new_full(inferred_shape, UNWRITTEN)
    y[0, 0, : input_tensor.shape[1]] = input_tensor[0].flatten(1)
    return y


def rotary_embedding_llama(input_tensor, cos_cache, sin_cache, trans_mat, *, is_decode_mode=False):
    """Rotation of neighbouring pairs: x cos + (x T) sin, T a 32 x 32 matrix applied to each tile of columns.

    Prefill: x [B, Q, S, D], cos and sin [1, 1, >= S, D], T [1, 1, 32, 32]. Decode: x [1, B, Q, D], cos and sin
    [1, B, 1, D], T [1, 1, 32 B, 32], each row of the batch with its own.
    """
    tiles = input_tensor.unflatten(-1, (-1, TILE))  # [..., D/32, 32]
    if is_decode_mode:
        batch = input_tensor.shape[1]
        matrix = trans_mat.reshape(-1, TILE, TILE)
        matrix = matrix[:batch] if len(matrix) >= batch else matrix[:1].expand(batch, -1, -1)
        rotated = tiles @ matrix[None, :, None]
        cos, sin = cos_cache[:, :batch], sin_cache[:, :batch]
    else:
        rotated = tiles @ trans_mat[0, 0, :TILE]
        rows = input_tensor.shape[2]
        cos, sin = cos_cache[:, :, :rows], sin_cache[:, :, :rows]
    return input_tensor * cos + rotated.flatten(-2) * sin


def rotary_embedding_llama_fused_qk(q_input_tensor, k_input_tensor, cos_cache, sin_cache, trans_mat):
    """Decode form for q and k at once: cos and sin [1, 2 B, 1, D] and T [1, 1, 64 B, 32], first for q, then for k."""
    batch = q_input_tensor.shape[1]
    return tuple(
        rotary_embedding_llama(
            x,
            cos_cache[:, first : first + batch],
            sin_cache[:, first : first + batch],
            trans_mat[:, :, first * TILE : (first + batch) * TILE],
            is_decode_mode=True,
        )
        for x, first in ((q_input_tensor, 0), (k_input_tensor, batch))
    )


def rotary_embedding_hf(input_tensor, cos_cache, sin_cache, *, is_decode_mode=False):
    """Rotation of the two halves of each head, as in Hugging Face's Llama."""
    if is_decode_mode:
        cos, sin = (table[:, : input_tensor.shape[1]] for table in (cos_cache, sin_cache))
    else:
        cos, sin = (table[:, :, : input_tensor.shape[2]] for table in (cos_cache, sin_cache))
    first, second = input_tensor.chunk(2, -1)
    return input_tensor * cos + torch.cat((-second, first), -1) * sin


# ---- attention ------------------------------------------------------------------------------------------------------


def attention(q, k, v, scale, mask=None):
    """softmax(scale q k' + mask) v for q [B, Q, n, D], k and v [B, KV, T, D], mask broadcasting to [B, Q, n, T]."""
    batch, heads, rows, _ = q.shape
    kv_heads, length = k.shape[1:3]
    scores = q.reshape(batch, kv_heads, -1, q.shape[-1]) @ k.mT  # query heads of one kv head are neighbours
    scores = scores.reshape(batch, heads, rows, length) * scale
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1).reshape(batch, kv_heads, -1, length)
    return (weights @ v).reshape(batch, heads, rows, -1)


def attention_of_seen(q, k, v, scale, mask):
    """`attention` with a mask for all heads, each row over the columns it sees alone.

    A weight of 0 adds nothing to a sum, but where the zeros stand changes its rounding: this way, as in causal
    attention, a row's bits do not depend on what is hidden from it.
    """
    if mask.shape[:2] != (1, 1):
        return attention(q, k, v, scale, mask)
    rows = []
    for row in range(q.shape[2]):
        columns = (mask[0, 0, row] > HIDDEN).nonzero().flatten()
        columns = columns if len(columns) else torch.arange(k.shape[2])
        keys, values = (x[:, :, columns] for x in (k, v))
        rows.append(attention(q[:, :, row, None], keys, values, scale, mask[:, :, row, None, columns]))
    return torch.cat(rows, 2)


def causal_mask(rows, length, start):
    """[rows, length]: row r sees positions up to start + r."""
    return torch.full((rows, length), float("-inf")).triu(start + 1)


def scaled_dot_product_attention(
    input_tensor_q,
    input_tensor_k,
    input_tensor_v,
    *,
    attn_mask=None,
    attn_mask_block_map=None,
    is_causal=True,
    scale=None,
    output_concat_heads=False,
    program_config=None,
):
    """q [B, Q, n, D], k and v [B, KV, T, D], mask [1 or B, 1 or Q, n, T], added to the scores.

    attn_mask_block_map [.., n / q_chunk, T / k_chunk]: 0 for blocks of the mask that are neither read nor computed.
    Raises ValueError where that leaves a row nothing, for which ttnn promises no value.
    """
    rows, length = input_tensor_q.shape[2], input_tensor_k.shape[2]
    if is_causal:
        attn_mask = causal_mask(rows, length, max(0, length - rows))
    if attn_mask_block_map is not None:
        chunks = program_config.q_chunk_size, program_config.k_chunk_size
        read = attn_mask_block_map.repeat_interleave(chunks[0], -2).repeat_interleave(chunks[1], -1)
        attn_mask = attn_mask.masked_fill(read[..., :rows, :length] == 0, float("-inf"))
        if not attn_mask.isfinite().any(-1).all():
            raise ValueError("attention: a row whose every block is left out has no value")
    scale = input_tensor_q.shape[-1] ** -0.5 if scale is None else scale
    attend = attention if attn_mask is None or is_causal else attention_of_seen
    y = attend(input_tensor_q, input_tensor_k, input_tensor_v, scale, attn_mask)
    return nlp_concat_heads(y) if output_concat_heads else y


def pages(cache, page_row, length=None):
    """[1, KV, length, D]: the first `length` positions (all of them) of a sequence, its pages joined."""
    block = cache.shape[2]
    page_row = page_row.long() if length is None else page_row[: -(-length // block)].long()
    joined = cache[page_row[0], None] if len(page_row) == 1 else cache[page_row].transpose(0, 1).flatten(1, 2)[None]
    return joined[:, :, :length]


def paged_scaled_dot_product_attention_decode(
    input_tensor_q,
    input_tensor_k,
    input_tensor_v,
    page_table_tensor,
    *,
    is_causal=True,
    attn_mask=None,
    cur_pos_tensor=None,
    scale=None,
    spec_multi_pos_tiles=0,
):
    """Rows of q [1, B, Q, D] attend to their pages up to cur_pos (-1: the row is not written); if not causal, to all of
    them with the mask [B, 1, Q, T].

    spec_multi_pos_tiles n: q [1, 1, 32 n, D] holds n rows of one sequence, one tile of heads each.

    Raises:
        ValueError: the mask is not [B, ...]; ttnn accepts it, and then uses the first row's mask for all.
    """
    q, positions = input_tensor_q, None
    if is_causal:
        positions = cur_pos_tensor.flatten().tolist()
    if spec_multi_pos_tiles:
        q = q.reshape(1, spec_multi_pos_tiles, TILE, -1)
        page_table_tensor = page_table_tensor[:1].expand(spec_multi_pos_tiles, -1)
    if attn_mask is not None and attn_mask.shape[0] != q.shape[1]:
        raise ValueError(f"attention mask {list(attn_mask.shape)} for {q.shape[1]} rows: its first dimension must be B")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y = torch.full_like(q, UNWRITTEN)
    for row in range(q.shape[1]):
        length, mask = None, None
        if positions is not None:
            if positions[row] < 0:
                continue
            length = positions[row] + 1
        elif attn_mask is not None:
            mask = attn_mask[row].transpose(0, 1)  # [Q, 1, T]
        k, v = (pages(cache, page_table_tensor[row], length) for cache in (input_tensor_k, input_tensor_v))
        y[0, row] = attention(q[:, row, :, None], k, v, scale, mask)[0, :, 0]
    return y.reshape(input_tensor_q.shape)


def scaled_dot_product_attention_decode(
    input_tensor_q,
    input_tensor_k,
    input_tensor_v,
    *,
    is_causal=True,
    attn_mask=None,
    cur_pos=(),
    cur_pos_tensor=None,
    scale=None,
    share_cache=False,
):
    batch = input_tensor_q.shape[1]
    table = torch.zeros(batch, 1) if share_cache else torch.arange(batch)[:, None]
    if cur_pos_tensor is None and len(cur_pos):
        cur_pos_tensor = torch.tensor(list(cur_pos))
    return paged_scaled_dot_product_attention_decode(
        input_tensor_q,
        input_tensor_k,
        input_tensor_v,
        table,
        is_causal=is_causal,
        attn_mask=attn_mask,
        cur_pos_tensor=cur_pos_tensor,
        scale=scale,
    )


def chunked_scaled_dot_product_attention(
    input_tensor_q,
    input_tensor_k,
    input_tensor_v,
    page_table_tensor,
    chunk_start_idx=None,
    *,
    chunk_start_idx_tensor=None,
    scale=None,
):
    """Rows of q [B, Q, n, D] stand at positions chunk_start_idx.. and see the pages up to themselves."""
    start = chunk_start_idx if chunk_start_idx_tensor is None else int(chunk_start_idx_tensor.flatten()[0])
    rows = input_tensor_q.shape[2]
    scale = input_tensor_q.shape[-1] ** -0.5 if scale is None else scale
    mask = causal_mask(rows, start + rows, start)
    return torch.cat(
        [
            attention(
                input_tensor_q[row, None],
                pages(input_tensor_k, page_table_tensor[row], start + rows),
                pages(input_tensor_v, page_table_tensor[row], start + rows),
                scale,
                mask,
            )
            for row in range(input_tensor_q.shape[0])
        ]
    )
