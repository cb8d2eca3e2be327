"""What ttnn operations compute, in torch: the ones whose golden function ttnn lacks, or has in a form too slow or too
narrow for a whole model.

Names and order of parameters are ttnn's, so that a call's arguments can be passed on. Values are float32 or int64,
with the logical shape that the tensor has on one device; rounding to the tensor's own type is `shadow`'s work.

A function with a parameter `inferred_shape` is told the shape that ttnn infers for its result, one with a parameter
`memory_configs` where its tensors lie. What a kernel leaves unwritten is NaN, so that nobody counts on it.
"""

import torch
import ttnn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary
from ttnn.operations.activations import get_golden_function_for_activation

TILE = 32
# Bits of a significand, the leading 1 among them, that the matrix engine multiplies in one pass: of a matmul's first
# operand, which lies in register SrcB, and of its second one, in SrcA.
FIRST_BITS, SECOND_BITS = 7, 5
UNWRITTEN = float("nan")  # what a kernel leaves as it was
HIDDEN = -1e6  # what is added to a score that leaves no weight beside others: far less than exp can tell from 0


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def activated(x, activations):
    """x after each of ttnn's activations: names, UnaryOpType or UnaryWithParam; one of them or a list."""
    for activation in activations if isinstance(activations, (list, tuple)) else (activations,):
        x = get_golden_function_for_activation(activation)(x)
    return x


def matmul(
    input_tensor_a,
    input_tensor_b,
    transpose_a=False,
    transpose_b=False,
    *,
    bias=None,
    activation=None,
    program_config=None,
    compute_kernel_config=None,
    dtype=None,
    memory_configs=(),
):
    """Multiplied with as many bits as the compute kernel configuration's fidelity says; all of them without one.

    The bits are those of bf16, as which the engine holds block formats too; float32 operands are not cut to what it
    takes of them. Sums are in fp32, whatever the configuration says of them.

    Raises ValueError for columns of a core's output that are cut into blocks while the weight lies in DRAM shards:
    ttnn accepts it, and its kernel then reads the first columns for each of them.
    """
    _check_width_blocks(program_config, memory_configs)
    a, b = input_tensor_a, input_tensor_b
    passes = _passes(a, b, getattr(compute_kernel_config, "math_fidelity", None))
    y, *rest = (_whole_tiles(x.mT if transpose_a else x, w.mT if transpose_b else w) for x, w in passes)
    for lower in rest:
        y = y + lower
    if bias is not None:
        y = y + bias
    activation = getattr(program_config, "fused_activation", None) or activation
    return y if activation is None else activated(y, activation)


def _whole_tiles(a, b):
    """a @ b in whole tiles of rows, as the device does it: torch's order of summation depends on their number."""
    rows = a.shape[-2] if a.ndim > 1 else TILE
    return (functional.pad(a, (0, 0, 0, -rows % TILE)) @ b)[..., :rows, :] if rows % TILE else a @ b


def _passes(a, b, fidelity):
    """What is multiplied at a fidelity: pairs of operands, to be summed.

    The engine takes the upper bits of both operands (LoFi), then the lower ones of the second (HiFi2), of the first
    (HiFi3), and of both (HiFi4). Passes with one operand in common are one multiplication here. Sources: tt-metal's
    tech_reports/matrix_engine; `FidelityMasking` and `MatmulGolden` of tt-llk's golden_generators.py, which give SrcB
    to the first operand; "Fidelity phases" in tt-isa-documentation's SrcASrcB.md. Wormhole and Blackhole are alike.
    """
    if fidelity == ttnn.MathFidelity.LoFi:
        return [(upper_bits(a, FIRST_BITS), _upper_of_second(b))]
    if fidelity == ttnn.MathFidelity.HiFi2:
        return [(upper_bits(a, FIRST_BITS), b)]
    if fidelity == ttnn.MathFidelity.HiFi3:
        upper = upper_bits(a, FIRST_BITS)
        return [(upper, b), (a - upper, _upper_of_second(b))]
    return [(a, b)]


def upper_bits(x, bits):
    """float32 values cut off after so many bits of the significand, the leading 1 among them."""
    return (x.contiguous().view(torch.int32) & -(1 << (24 - bits))).view(torch.float32)


_uppers = WeakTensorKeyDictionary()  # second operand: (its version, its upper bits; None where it has no others)


def _upper_of_second(b):
    """`upper_bits` of a second operand, kept as long as it lives and is not written to: most are weights."""
    version, upper = _uppers.get(b, (None, None))
    if version != b._version:
        upper = upper_bits(b, SECOND_BITS)
        upper = None if torch.equal(upper, b) else upper
        _uppers[b] = b._version, upper
    return b if upper is None else upper


def _check_width_blocks(program_config, memory_configs):
    if isinstance(program_config, ttnn.MatmulMultiCoreReuseMultiCastProgramConfig):
        weight = memory_configs[1]
        cut = program_config.out_block_w < program_config.per_core_N
        if cut and weight.is_sharded() and weight.buffer_type == ttnn.BufferType.DRAM:
            raise ValueError(
                f"matmul: blocks of {program_config.out_block_w} of {program_config.per_core_N} columns of a weight "
                "sharded over DRAM: the kernel reads the same columns for each block"
            )


def binary(function):
    def golden(
        input_tensor_a,
        input_tensor_b,
        *,
        dtype=None,
        activations=(),
        input_tensor_a_activations=(),
        input_tensor_b_activations=(),
        fast_and_approximate_mode=None,
        use_legacy=None,
    ):
        a = activated(input_tensor_a, input_tensor_a_activations)
        b = activated(input_tensor_b, input_tensor_b_activations)
        return activated(function(a, b), activations)

    return golden


def rms_norm(input_tensor, *, epsilon=1e-12, weight=None, bias=None, residual_input_tensor=None):
    x = input_tensor if residual_input_tensor is None else input_tensor + residual_input_tensor
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    if weight is not None:  # [1, 1, H/32, 32] or [1, 1, 1, H]
        x = x * weight.reshape(-1)
    return x if bias is None else x + bias.reshape(-1)


def embedding(input_tensor, weight, *, layout=None, padding_idx=None, dtype=None, embeddings_type=None):
    rows = functional.embedding(input_tensor.long(), weight.reshape(-1, weight.shape[-1]))
    return rows.reshape(input_tensor.shape[0], -1, rows.shape[-1])


def argmax(input_tensor, dim=None, keepdim=False, *, use_multicore=None):
    return input_tensor.argmax(dim, keepdim)  # the lowest index of equal maxima


def topk(input_tensor, k=32, dim=-1, largest=True, sorted=True, *, stable=None, indices_tensor=None):
    values, indices = input_tensor.sort(dim=dim, descending=largest, stable=True)  # the lowest index of equals first
    values, indices = values.narrow(dim, 0, k), indices.narrow(dim, 0, k)
    return values, indices if indices_tensor is None else indices_tensor.long().gather(dim, indices)


def typecast(input_tensor, *_, **__):
    return input_tensor


def same(x, *_, **__):
    return x


def zeros(*_, inferred_shape, **__):
    return torch.zeros(inferred_shape)


def ones(*_, inferred_shape, **__):
    return torch.ones(inferred_shape)


def full(shape=None, fill_value=0.0, *_, inferred_shape, **__):
    return torch.full(inferred_shape, fill_value)


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


# ---- KV cache: these write into their first argument ----------------------------------------------------------------


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


# ---- across devices: lists of values, one per device of the group ---------------------------------------------------


def all_gather(values, *, dim):
    return [torch.cat(values, dim)] * len(values)


def all_reduce(values):
    return [torch.stack(values).sum(0)] * len(values)


def reduce_scatter(values, *, dim):
    return list(torch.stack(values).sum(0).chunk(len(values), dim))


def mesh_partition(values, *, dim):
    return [value.chunk(len(values), dim)[i] for i, value in enumerate(values)]


# ---- by name --------------------------------------------------------------------------------------------------------

GOLDENS = {
    "ttnn.add": binary(torch.add),
    "ttnn.argmax": argmax,
    "ttnn.clone": same,
    "ttnn.embedding": embedding,
    "ttnn.empty": zeros,
    "ttnn.empty_like": zeros,
    "ttnn.full": full,
    "ttnn.full_like": full,
    "ttnn.interleaved_to_sharded": same,
    "ttnn.linear": matmul,
    "ttnn.matmul": matmul,
    "ttnn.move": same,
    "ttnn.multiply": binary(torch.mul),
    "ttnn.ones": ones,
    "ttnn.ones_like": ones,
    "ttnn.reallocate": same,
    "ttnn.reshard": same,
    "ttnn.rms_norm": rms_norm,
    "ttnn.sharded_to_interleaved": same,
    "ttnn.subtract": binary(torch.sub),
    "ttnn.tilize": same,
    "ttnn.to_dtype": same,
    "ttnn.to_layout": same,
    "ttnn.to_memory_config": same,
    "ttnn.topk": topk,
    "ttnn.typecast": same,
    "ttnn.untilize": same,
    "ttnn.zeros": zeros,
    "ttnn.zeros_like": zeros,
    "ttnn.allocate_tensor_on_device": zeros,
    "ttnn.experimental.nlp_concat_heads": nlp_concat_heads,
    "ttnn.experimental.nlp_concat_heads_decode": nlp_concat_heads_decode,
    "ttnn.experimental.nlp_create_qkv_heads": nlp_create_qkv_heads,
    "ttnn.experimental.nlp_create_qkv_heads_decode": nlp_create_qkv_heads_decode,
    "ttnn.experimental.rotary_embedding_hf": rotary_embedding_hf,
    "ttnn.experimental.rotary_embedding_llama": rotary_embedding_llama,
    "ttnn.experimental.rotary_embedding_llama_fused_qk": rotary_embedding_llama_fused_qk,
    "ttnn.transformer.chunked_scaled_dot_product_attention": chunked_scaled_dot_product_attention,
    "ttnn.transformer.paged_scaled_dot_product_attention_decode": paged_scaled_dot_product_attention_decode,
    "ttnn.transformer.scaled_dot_product_attention": scaled_dot_product_attention,
    "ttnn.transformer.scaled_dot_product_attention_decode": scaled_dot_product_attention_decode,
}

# Name: the function, then the parameters that it writes to, each with the one whose values it writes there.
IN_PLACE = {
    "ttnn.copy": (copy, {"input_b": "input_a"}),
    "ttnn.fill_cache": (fill_cache, {"cache_tensor": "input_tensor"}),
    "ttnn.kv_cache.fill_cache_for_user_": (fill_cache, {"cache_tensor": "input_tensor"}),
    "ttnn.plus_one": (plus_one, {"input_tensor": None}),
    "ttnn.update_cache": (update_cache, {"cache": "input"}),
    "ttnn.experimental.indexed_fused_update_cache": (
        indexed_fused_update_cache,
        {"cache_tensor1": "input_tensor1", "cache_tensor2": "input_tensor2"},
    ),
    "ttnn.experimental.paged_fill_cache": (paged_fill_cache, {"cache_tensor": "input_tensor"}),
    "ttnn.experimental.paged_fused_update_cache": (
        paged_fused_update_cache,
        {"cache_tensor1": "input_tensor1", "cache_tensor2": "input_tensor2"},
    ),
    "ttnn.experimental.paged_update_cache": (paged_update_cache, {"cache_tensor": "input_tensor"}),
}

COLLECTIVES = {
    "ttnn.all_gather": all_gather,
    "ttnn.all_reduce": all_reduce,
    "ttnn.mesh_partition": mesh_partition,
    "ttnn.reduce_scatter": reduce_scatter,
    "ttnn.experimental.all_gather_async": all_gather,
    "ttnn.experimental.all_reduce_async": all_reduce,
    "ttnn.experimental.reduce_scatter_minimal_async": reduce_scatter,
}

# Of no influence on values.
PLACEMENT = {
    *("memory_config", "compute_kernel_config", "core_grid", "sub_core_grids", "queue_id", "cq_id", "program_config"),
    *("device", "mesh_device", "optional_output_tensor", "output_tensor", "output_tensors", "output", "out"),
}
assert ttnn.TILE_SIZE == TILE
