"""Shadow values: what layers are made of, against plain torch: norms, products, heads, rotations."""

import gc
import math

import pytest
import torch
import ttnn
from torch.nn import functional

from models.tests.ttnn.shadow_fixtures import (
    BF4,
    BF8,
    BF16,
    DRAM,
    FP32,
    KV,
    ROW_MAJOR,
    SILU,
    TILE,
    UINT32,
    B,
    D,
    H,
    Q,
    bf16,
    height_sharded,
    rotate_pairs,
    rotation,
)


def test_embedding_gives_rows_of_the_table(put, same):
    ids, table = torch.randint(0, 100, (1, B)), bf16(100, H)
    same(ttnn.embedding(put(ids, UINT32), put(table, layout=ROW_MAJOR), layout=TILE), table[ids])
    same(ttnn.embedding(put(ids, UINT32), put(table[None, None], layout=ROW_MAJOR), layout=TILE), table[ids])


@pytest.mark.parametrize("tiled_weight", [True, False])
def test_rms_norm_equals_torch(put, same, tiled_weight):
    x, weight = bf16(1, 1, B, H), bf16(H)
    gamma = put(weight.reshape(1, 1, 1, H)) if tiled_weight else put(weight.reshape(1, 1, -1, 32), layout=ROW_MAJOR)
    expected = functional.rms_norm(x, (H,), weight, 1e-5)
    same(ttnn.rms_norm(put(x), epsilon=1e-5, weight=gamma), expected)
    residual = bf16(1, 1, B, H)
    fused = ttnn.rms_norm(put(x), epsilon=1e-5, weight=gamma, residual_input_tensor=put(residual))
    same(fused, functional.rms_norm(x + residual, (H,), weight, 1e-5))


def test_sharded_rms_norm_equals_torch(put, same):
    x, weight = bf16(1, 1, 32, H), bf16(H)
    config = ttnn.create_sharded_memory_config(
        (1, 1, 32, H), ttnn.CoreGrid(x=8, y=1), ttnn.ShardStrategy.WIDTH, ttnn.ShardOrientation.ROW_MAJOR
    )
    program = ttnn.LayerNormShardedMultiCoreProgramConfig(
        compute_with_storage_grid_size=[8, 1], subblock_w=1, block_h=1, block_w=1, inplace=False
    )
    gamma = put(weight.reshape(1, 1, -1, 32), layout=ROW_MAJOR)
    y = ttnn.rms_norm(
        put(x, memory_config=config), epsilon=1e-5, weight=gamma, program_config=program, memory_config=config
    )
    same(y, functional.rms_norm(x, (H,), weight, 1e-5))


def test_linear_equals_torch(put, same):
    x, w, bias = bf16(1, 1, B, H), bf16(1, 1, H, 96) / 16, bf16(1, 1, 1, 96)
    same(ttnn.linear(put(x), put(w)), x @ w, 2**-6)
    same(ttnn.linear(put(x), put(w), bias=put(bias)), x @ w + bias, 2**-6)
    same(ttnn.linear(put(x), put(w), activation="silu"), functional.silu(x @ w), 2**-6)
    same(ttnn.linear(put(x), put(w.mT.contiguous()), transpose_b=True), x @ w, 2**-6)
    same(ttnn.matmul(put(x), put(w), dtype=FP32), x @ w, 1e-4)


FIDELITIES = ("LoFi", "HiFi2", "HiFi3", "HiFi4")


@pytest.fixture
def multiplied(put, shadow, mesh_device):
    """multiplied(x, w, fidelity, format of w): what the first chip has of x @ w, in float32."""

    def run(x, w, fidelity, dtype=BF16):
        compute = ttnn.init_device_compute_kernel_config(
            mesh_device.arch(), math_fidelity=getattr(ttnn.MathFidelity, fidelity)
        )
        return shadow.value(ttnn.linear(put(x), put(w, dtype=dtype), dtype=FP32, compute_kernel_config=compute))[0]

    return run


def significand(value):
    """(sign, eight bits with the leading 1, exponent) of a number that bfloat16 holds."""
    fraction, exponent = math.frexp(abs(value))
    return math.copysign(1, value), int(fraction * 256), exponent - 8


def by_phases(x, w, phases):
    """x w of two numbers by the first phases of the engine, bit by bit."""
    (sign_x, bits_x, exponent_x), (sign_w, bits_w, exponent_w) = significand(x), significand(w)
    high, low = (0b11111110, 0b11111000), (0b00000001, 0b00000111)
    masks = [high, (high[0], low[1]), (low[0], high[1]), low][:phases]
    product = sum((bits_x & mask_x) * (bits_w & mask_w) for mask_x, mask_w in masks)
    return sign_x * sign_w * math.ldexp(product, exponent_x + exponent_w)


@pytest.mark.parametrize("dtype", [BF16, BF8, BF4], ids=["bf16", "bfp8", "bfp4"])
@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_a_fidelity_multiplies_the_bits_that_its_phases_take(put, shadow, multiplied, fidelity, dtype):
    x, w = bf16(3, 32), bf16(32, 5)
    kept = shadow.value(put(w, dtype=dtype))[0]
    phases = FIDELITIES.index(fidelity) + 1
    expected = [
        [sum(by_phases(*pair, phases) for pair in zip(row, column, strict=True)) for column in kept.t().tolist()]
        for row in x.tolist()
    ]
    assert torch.allclose(multiplied(x, w, fidelity, dtype), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "w", "products"),
    [
        (1 + 2**-6, 1.0, (1 + 2**-6,) * 4),  # seven bits of the first operand
        (1 + 2**-7, 1.0, (1, 1, 1 + 2**-7, 1 + 2**-7)),
        (1.0, 1 + 2**-4, (1 + 2**-4,) * 4),  # five of the second
        (1.0, 1 + 2**-5, (1, 1 + 2**-5, 1 + 2**-5, 1 + 2**-5)),
        (-1.0, 1 + 2**-7, (-1, -1 - 2**-7, -1 - 2**-7, -1 - 2**-7)),
        (1 + 2**-7, 1 + 2**-7, (1, 1 + 2**-7, 1 + 2**-6, (1 + 2**-7) ** 2)),
    ],
)
def test_the_first_operand_has_seven_bits_in_a_pass_and_the_second_five(multiplied, x, w, products):
    made = [multiplied(torch.tensor([[x]]), torch.tensor([[w]]), fidelity).item() for fidelity in FIDELITIES]
    assert made == list(products)


def test_lofi_loses_nothing_of_bfp4_weights_and_something_of_bfp8(multiplied):
    x, w = bf16(4, 64), bf16(64, 32)
    assert torch.equal(multiplied(x, w, "LoFi", BF4), multiplied(x, w, "HiFi2", BF4))
    assert not torch.equal(multiplied(x, w, "LoFi", BF8), multiplied(x, w, "HiFi2", BF8))


def test_lofi_reads_a_weight_as_it_is_now_and_forgets_it_with_its_tensor(put, shadow, mesh_device):
    from models.board_mock import goldens

    gc.collect()
    before = len(goldens._uppers)
    compute = ttnn.init_device_compute_kernel_config(mesh_device.arch(), math_fidelity=ttnn.MathFidelity.LoFi)
    x, weights = put(torch.ones(32, 32)), [put(torch.full((32, 32), 1 + 2**-6))]

    def product():
        return shadow.value(ttnn.linear(x, *weights, compute_kernel_config=compute))[0][0, 0].item()

    assert product() == product() == 32
    ttnn.copy(put(torch.full((32, 32), 2 + 2**-5)), *weights)
    assert product() == 64
    assert len(goldens._uppers) > before
    weights.clear()
    gc.collect()
    assert len(goldens._uppers) == before


def test_matmul_with_a_program_config_and_shards_equals_torch(put, same):
    x, w = bf16(1, 1, 32, H), bf16(1, 1, H, H) / 16
    config = ttnn.create_sharded_memory_config(
        (1, 1, 32, H), ttnn.CoreGrid(x=8, y=1), ttnn.ShardStrategy.WIDTH, ttnn.ShardOrientation.ROW_MAJOR
    )
    program = ttnn.MatmulMultiCoreReuseMultiCast1DProgramConfig(
        compute_with_storage_grid_size=(8, 1),
        in0_block_w=1,
        out_subblock_h=1,
        out_subblock_w=1,
        per_core_M=1,
        per_core_N=1,
        fuse_batch=True,
        fused_activation=SILU,
        mcast_in0=True,
    )
    y = ttnn.linear(put(x, memory_config=config), put(w), program_config=program, memory_config=config)
    same(y, functional.silu(x @ w), 2**-6)


def test_heads_are_split_and_joined(put, same, shadow):
    x = bf16(1, 1, B, (Q + 2 * KV) * D)
    q, k, v = (part.unflatten(-1, (-1, D))[0] for part in x.split((Q * D, KV * D, KV * D), -1))  # [1, B, n, D]
    outputs = ttnn.experimental.nlp_create_qkv_heads(
        put(x), num_heads=Q, num_kv_heads=KV, transpose_k_heads=False, memory_config=DRAM
    )
    for tensor, expected in zip(outputs, (q, k, v), strict=True):
        same(tensor, expected.transpose(1, 2))
    same(ttnn.experimental.nlp_concat_heads(outputs[0]), q.reshape(1, 1, B, Q * D))
    transposed = ttnn.experimental.nlp_create_qkv_heads(put(x), num_heads=Q, num_kv_heads=KV, transpose_k_heads=True)
    same(transposed[1], k.transpose(1, 2).mT)
    outputs = ttnn.experimental.nlp_create_qkv_heads_decode(
        put(x), num_heads=Q, num_kv_heads=KV, memory_config=ttnn.L1_HEIGHT_SHARDED_MEMORY_CONFIG
    )
    for tensor, expected in zip(outputs, (q, k, v), strict=True):
        same(tensor, expected)
    joined = shadow.value(ttnn.experimental.nlp_concat_heads_decode(outputs[0], num_heads=Q))[0]
    assert torch.equal(joined[:, :, :B], q.reshape(1, 1, B, Q * D))
    assert joined[:, :, B:].isnan().all()  # the kernel does not write them


def angles(positions):
    """[n, D/2] angles of Llama's rotary embedding."""
    return positions[:, None] * 10000 ** (-torch.arange(0, D, 2) / D)


def tables(angle, interleaved=True):
    """cos and sin [n, D] of angles [n, D/2], as bfloat16 holds them."""
    expand = (lambda x: x.repeat_interleave(2, -1)) if interleaved else (lambda x: torch.cat((x, x), -1))
    return tuple(expand(table).bfloat16().float() for table in (angle.cos(), angle.sin()))


def test_rotary_embedding_llama_turns_neighbouring_pairs(put, same):
    x, angle = bf16(1, Q, B, D), angles(torch.arange(100, 100 + B))
    cos, sin = (put(table[None, None]) for table in tables(angle))
    expected = rotate_pairs(x, angle)
    same(ttnn.experimental.rotary_embedding_llama(put(x), cos, sin, put(rotation())), expected, 0.02)
    wrong = ttnn.experimental.rotary_embedding_llama(put(x), cos, sin, put(torch.zeros(1, 1, 32, 32)))
    same(wrong, x * tables(angle)[0])  # a matrix of zeros takes the sine's part away


def decode_tables(put, angle, rows, interleaved=True):
    config = height_sharded(rows, 32, D)
    return tuple(put(table[None, :, None], memory_config=config) for table in tables(angle, interleaved))


def test_rotary_embedding_llama_decode_gives_each_row_its_own_angle(put, same):
    x, angle = bf16(1, B, Q, D), angles(torch.tensor([3, 100, 7, 50, 0]))
    cos, sin = decode_tables(put, angle, B)
    matrix = put(rotation().repeat(1, 1, B, 1), memory_config=height_sharded(B, 32, 32))
    tensor = put(x, memory_config=height_sharded(B, 32, D))
    y = ttnn.experimental.rotary_embedding_llama(tensor, cos, sin, matrix, is_decode_mode=True)
    same(y, rotate_pairs(x, angle[None, :, None].expand(1, B, Q, D // 2)), 0.02)


def test_fused_rotary_embedding_turns_q_and_k(put, same):
    q, k, angle = bf16(1, B, Q, D), bf16(1, B, KV, D), angles(torch.tensor([3, 100, 7, 50, 0, 8, 1, 20, 70, 5]))
    grid = ttnn.CoreRangeSet({ttnn.CoreRange(ttnn.CoreCoord(0, 0), ttnn.CoreCoord(B - 1, 1))})
    both, first, second = (
        ttnn.MemoryConfig(
            ttnn.TensorMemoryLayout.HEIGHT_SHARDED,
            ttnn.BufferType.L1,
            ttnn.ShardSpec(cores, (32, D), ttnn.ShardOrientation.ROW_MAJOR),
        )
        for cores in (
            grid,
            *(ttnn.CoreRangeSet({ttnn.CoreRange(ttnn.CoreCoord(0, y), ttnn.CoreCoord(B - 1, y))}) for y in (0, 1)),
        )
    )
    cos, sin = (put(table[None, :, None], memory_config=both) for table in tables(angle))
    matrix = put(
        rotation().repeat(1, 1, 2 * B, 1),
        memory_config=ttnn.MemoryConfig(
            ttnn.TensorMemoryLayout.HEIGHT_SHARDED,
            ttnn.BufferType.L1,
            ttnn.ShardSpec(grid, (32, 32), ttnn.ShardOrientation.ROW_MAJOR),
        ),
    )
    outputs = ttnn.experimental.rotary_embedding_llama_fused_qk(
        put(q, memory_config=first), put(k, memory_config=second), cos, sin, matrix
    )
    for tensor, x, own in zip(outputs, (q, k), angle.split(B), strict=True):
        same(tensor, rotate_pairs(x, own[None, :, None].expand(1, B, x.shape[2], D // 2)), 0.02)


@pytest.mark.parametrize("decode", [False, True])
def test_rotary_embedding_hf_turns_halves(put, same, decode):
    angle = angles(torch.tensor([3, 100, 7, 50, 0]))
    x = bf16(1, B, Q, D)
    pairs = x.unflatten(-1, (2, -1)).mT.flatten(-2)  # halves as neighbouring pairs
    expected = rotate_pairs(pairs, angle[None, :, None].expand(1, B, Q, D // 2)).unflatten(-1, (-1, 2)).mT.flatten(-2)
    if decode:
        cos, sin = decode_tables(put, angle, B, interleaved=False)
        tensor = put(x, memory_config=height_sharded(B, 32, D))
        same(ttnn.experimental.rotary_embedding_hf(tensor, cos, sin, is_decode_mode=True), expected, 0.02)
    else:
        cos, sin = (put(table[None, None]) for table in tables(angle, interleaved=False))
        y = ttnn.experimental.rotary_embedding_hf(put(x.transpose(1, 2).contiguous()), cos, sin, is_decode_mode=False)
        same(y, expected.transpose(1, 2), 0.02)
