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

from models.board_mock.golden_attention import (
    chunked_scaled_dot_product_attention,
    nlp_concat_heads,
    nlp_concat_heads_decode,
    nlp_create_qkv_heads,
    nlp_create_qkv_heads_decode,
    paged_scaled_dot_product_attention_decode,
    rotary_embedding_hf,
    rotary_embedding_llama,
    rotary_embedding_llama_fused_qk,
    scaled_dot_product_attention,
    scaled_dot_product_attention_decode,
)
from models.board_mock.golden_cache import (
    copy,
    fill_cache,
    indexed_fused_update_cache,
    paged_fill_cache,
    paged_fused_update_cache,
    paged_update_cache,
    plus_one,
    update_cache,
)

TILE = 32
# Bits of a significand, the leading 1 among them, that the matrix engine multiplies in one pass: of a matmul's first
# operand, which lies in register SrcB, and of its second one, in SrcA.
FIRST_BITS, SECOND_BITS = 7, 5


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
