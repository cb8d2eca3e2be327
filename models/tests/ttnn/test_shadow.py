"""Shadow values: each operation's numbers against plain torch, its shape against ttnn's."""

import gc
import math
import subprocess
import sys

import pytest
import torch
import ttnn
from torch.nn import functional

TILE, ROW_MAJOR = ttnn.TILE_LAYOUT, ttnn.ROW_MAJOR_LAYOUT
BF16, BF8, BF4, FP32, INT32, UINT32 = (
    *(ttnn.bfloat16, ttnn.bfloat8_b, ttnn.bfloat4_b, ttnn.float32),
    *(ttnn.int32, ttnn.uint32),
)
L1, DRAM = ttnn.L1_MEMORY_CONFIG, ttnn.DRAM_MEMORY_CONFIG
SILU = ttnn.UnaryOpType.SILU
B, S, H, Q, KV, D = 5, 128, 256, 6, 2, 64  # rows, cache, hidden, query heads, kv heads, head


def bf16(*shape):
    """Random numbers that bfloat16 holds, as float32."""
    return torch.randn(shape).bfloat16().float()


def height_sharded(cores, height, width):
    """`cores` shards of [height, width], one per core."""
    grid = ttnn.num_cores_to_corerangeset(cores, ttnn.CoreCoord(8, 7), row_wise=True)
    return ttnn.create_sharded_memory_config(
        (height, width),
        grid,
        ttnn.ShardStrategy.HEIGHT,
        ttnn.ShardOrientation.ROW_MAJOR,
        use_height_and_width_as_shard_shape=True,
    )


def rotation():
    """The 32 x 32 matrix T of rotary_embedding_llama: (x T) of a pair (a, b) is (-b, a)."""
    matrix = torch.zeros(1, 1, 32, 32)
    for i in range(0, 32, 2):
        matrix[0, 0, i, i + 1], matrix[0, 0, i + 1, i] = 1, -1
    return matrix


def rotate_pairs(x, angle):
    """x [..., D] with each pair (2i, 2i + 1) turned by angle [..., D/2]."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2)


def attend(q, k, v, mask=None, causal=False):
    """Reference attention; q [B, Q, n, D], k and v [B, KV, T, D]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


@pytest.fixture
def put(mesh_device, shadow):
    """put(x, ...) is from_torch onto the mesh, replicated."""

    def put(x, dtype=BF16, layout=TILE, memory_config=DRAM):
        if x.dtype == torch.int64:
            dtype, layout, x = dtype if dtype in (INT32, UINT32) else INT32, ROW_MAJOR, x.int()
        return ttnn.from_torch(x, dtype=dtype, layout=layout, device=mesh_device, memory_config=memory_config)

    return put


@pytest.fixture
def same(shadow):
    """same(tensor, expected): shape as ttnn says, values on every device and as read back."""

    def same(tensor, expected, tolerance=2**-7):
        assert list(tensor.shape) == list(expected.shape)
        for value in shadow.value(tensor):
            torch.testing.assert_close(value.float(), expected.float(), rtol=tolerance, atol=tolerance)
        read = ttnn.to_torch(ttnn.get_device_tensors(tensor)[0])
        torch.testing.assert_close(read.float(), expected.float(), rtol=tolerance, atol=tolerance)

    return same


# ---- one tensor in, one out -----------------------------------------------------------------------------------------

X = (1, 1, 64, 96)
POSITIVE = {"log", "sqrt", "rsqrt"}
ELEMENTWISE = {
    "silu": functional.silu,
    "relu": torch.relu,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "neg": torch.neg,
    "abs": torch.abs,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "tanh": torch.tanh,
    "square": torch.square,
    "logical_not": torch.logical_not,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_operation_equals_torch(put, same, name):
    x = bf16(*X).abs() + 0.5 if name in POSITIVE else bf16(*X)
    x = x.bfloat16().float()
    same(getattr(ttnn, name)(put(x)), ELEMENTWISE[name](x))


BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("other", [X, (1, 1, 1, 96), (1, 1, 64, 1)], ids=str)
def test_binary_operation_equals_torch(put, same, name, other):
    a, b = (torch.randint(-3, 4, shape).float() for shape in (X, other))
    b = b + 5 * (b == 0) if name == "div" else b
    same(getattr(ttnn, name)(put(a), put(b)), BINARY[name](a, b))


def test_operators_of_tensors_and_numbers_equal_torch(put, same):
    a, b = bf16(*X), bf16(*X)
    same(put(a) + put(b), a + b)
    same(put(a) * 3.0, a * 3)
    same(put(a) - 2.0, a - 2)
    same(2.0 * put(a), a * 2)
    same(put(a) == put(a), torch.ones(X))
    same(put(a) @ put(b.mT.contiguous()), a @ b.mT, 0.1)


def test_fused_activation_is_applied_before_the_product(put, same):
    a, b = bf16(*X), bf16(*X)
    same(ttnn.mul(put(a), put(b), input_tensor_a_activations=[SILU]), functional.silu(a) * b)
    same(ttnn.add(put(a), put(b), activations=[SILU]), functional.silu(a + b))


def test_where_chooses_by_condition(put, same):
    condition, a, b = (bf16(*X) > 0).float(), bf16(*X), bf16(*X)
    same(ttnn.where(put(condition), put(a), put(b)), torch.where(condition > 0, a, b))


def test_integer_arithmetic_is_exact(put, same):
    a = torch.randint(0, 2**30, (1, 32))
    a_tile = ttnn.to_layout(put(a), TILE)
    same(ttnn.add(a_tile, 1), a + 1, 0)
    same(ttnn.eq(a_tile, a_tile), torch.ones(1, 32), 0)


REDUCTIONS = {
    "max": lambda x, d, k: x.max(d, keepdim=k).values,
    "min": lambda x, d, k: x.min(d, keepdim=k).values,
    "sum": lambda x, d, k: x.sum(d, keepdim=k),
    "mean": lambda x, d, k: x.mean(d, keepdim=k),
}


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("dim", [2, 3, -1])
def test_reduction_equals_torch(put, same, name, keepdim, dim):
    x = bf16(1, 2, 40, 96)
    same(getattr(ttnn, name)(put(x), dim=dim, keepdim=keepdim), REDUCTIONS[name](x, dim, keepdim), 2**-6)


def test_scans_and_products_equal_torch(put, same):
    x = (1 + bf16(1, 1, 32, 8) / 16).bfloat16().float()
    same(ttnn.cumsum(put(x), dim=3), x.cumsum(3), 2**-5)
    same(ttnn.cumprod(put(x), dim=3), x.cumprod(3), 2**-5)
    same(ttnn.prod(put(x), dim=3, keepdim=True), x.prod(3, keepdim=True), 2**-5)
    same(ttnn.softmax(put(x), dim=-1), x.softmax(-1))


@pytest.mark.parametrize("layout", [TILE, ROW_MAJOR])
def test_argmax_takes_the_lowest_index_of_equal_maxima(put, same, layout):
    x = torch.zeros(1, 1, B, 96)
    x[..., [7, 9, 40]] = 3
    x[:, :, 2, 5] = 4
    expected = torch.tensor([7, 7, 5, 7, 7])
    tensor = ttnn.to_layout(put(x), layout)
    same(ttnn.argmax(tensor, dim=3, keepdim=True), expected.reshape(1, 1, B, 1), 0)
    same(ttnn.argmax(tensor, dim=3, keepdim=False), expected.reshape(1, 1, B), 0)


def test_topk_gives_values_and_indices_in_order(put, same):
    x = torch.stack([torch.randperm(256).float() for _ in range(32)])[None, None]
    values, indices = ttnn.topk(put(x), k=32, dim=-1, largest=True, sorted=True)
    expected = x.topk(32)
    same(values, expected.values)
    same(indices, expected.indices, 0)


def test_gather_equals_torch(put, same):
    x, index = bf16(1, 1, 32, 64), torch.randint(0, 64, (1, 1, 32, 32))
    tensor = ttnn.to_layout(put(index, UINT32), TILE)
    same(ttnn.gather(put(x), dim=3, index=tensor), x.gather(3, index))


# ---- layout, type, memory -------------------------------------------------------------------------------------------


def test_moves_between_memories_and_layouts_keep_values(put, same):
    x = bf16(1, 1, 64, 128)
    config = height_sharded(2, 32, 128)
    tensor = put(x)
    same(ttnn.to_memory_config(tensor, L1), x)
    sharded = ttnn.to_memory_config(tensor, config)
    same(sharded, x)
    same(ttnn.interleaved_to_sharded(tensor, config), x)
    same(ttnn.sharded_to_interleaved(sharded, L1), x)
    same(ttnn.reshard(sharded, height_sharded(1, 64, 128)), x)
    rows = ttnn.to_layout(tensor, ROW_MAJOR)
    same(rows, x)
    same(ttnn.tilize(rows), x)
    same(ttnn.untilize(tensor), x)
    same(ttnn.clone(tensor), x)
    same(ttnn.reallocate(tensor), x)


def test_unpadding_and_padding_conversions(put, same):
    x = bf16(1, 1, B, 96)
    tensor = put(x)
    rows = ttnn.untilize_with_unpadding(tensor, output_tensor_end=(0, 0, B - 1, 63))
    same(rows, x[..., :64])
    same(ttnn.tilize_with_zero_padding(put(x, layout=ROW_MAJOR)), x)
    same(ttnn.pad(tensor, [(0, 0), (0, 0), (0, 27), (0, 0)], 2.0), functional.pad(x, (0, 0, 0, 27), value=2.0))


@pytest.mark.parametrize("dtype, error", [(BF16, 0.002), (BF8, 0.008), (BF4, 0.13), (FP32, 0)], ids=str)
def test_values_are_rounded_as_ttnn_rounds_them(put, shadow, dtype, error):
    x = torch.randn(1, 1, 64, 96)
    host = ttnn.to_torch(ttnn.from_torch(x, dtype=dtype, layout=TILE)).float()
    device = put(x, dtype)
    for value in shadow.value(device):
        assert torch.equal(value, host)
    again = shadow.value(ttnn.typecast(put(x, FP32), dtype))[0]
    assert torch.equal(again, host)
    relative = ((host - x).norm() / x.norm()).item()
    assert relative <= error and (relative > error / 4 or error == 0)


def test_linear_rounds_to_the_type_asked_for(put, shadow):
    x, w = bf16(1, 1, 32, H), bf16(1, 1, H, 64)
    y = shadow.value(ttnn.linear(put(x), put(w), dtype=BF8))[0]
    assert torch.equal(y, shadow.rounded(x @ w, BF8)) and not torch.equal(y, x @ w)


def test_typecast_to_integers_drops_the_fraction(put, same):
    x = torch.tensor([[0.0, 1.0, 2.75, 17.5]]).expand(32, 4)[None, None].contiguous()
    same(ttnn.typecast(put(x), UINT32), x.trunc(), 0)
    same(ttnn.typecast(put(x), INT32), x.trunc(), 0)


def test_shape_operations_equal_torch(put, same):
    x = bf16(1, 3, 40, 64)
    tensor = put(x)
    same(ttnn.transpose(tensor, 1, 2), x.transpose(1, 2))
    same(ttnn.transpose(tensor, -1, -2), x.mT)
    same(ttnn.permute(tensor, (0, 2, 3, 1)), x.permute(0, 2, 3, 1))
    same(ttnn.concat([tensor, tensor], dim=1), torch.cat((x, x), 1))
    same(ttnn.slice(tensor, [0, 1, 8, 0], [1, 3, 40, 32]), x[:, 1:3, 8:40, :32])
    same(tensor[:, 1:2, :32, :], x[:, 1:2, :32])
    same(tensor[0, 2], x[0, 2])
    same(ttnn.reshape(tensor, (1, 1, 120, 64)), x.reshape(1, 1, 120, 64))
    same(ttnn.reshape(put(x, layout=ROW_MAJOR), (3, 10, 4, 64)), x.reshape(3, 10, 4, 64))
    same(ttnn.unsqueeze_to_4D(put(x[0])), x)
    same(ttnn.unsqueeze(put(x[0]), 0), x)
    same(ttnn.squeeze(tensor, 0), x[0])
    same(ttnn.repeat(tensor, (2, 1, 1, 1)), x.repeat(2, 1, 1, 1))
    for half, expected in zip(ttnn.split(tensor, 32, 3), x.split(32, 3), strict=True):
        same(half, expected)


def test_reshape_views_rows_of_padding_as_rows_and_back(put, same):
    x = bf16(1, 1, 32, 64)
    few = ttnn.reshape(put(x), (1, 1, B, 64), (1, 1, 32, 64))
    same(few, x[:, :, :B])
    same(ttnn.reshape(few, (1, 1, 32, 64), (1, 1, 32, 64)), functional.pad(x[:, :, :B], (0, 0, 0, 27)))
    heads = bf16(1, B, Q, D)
    padded = functional.pad(heads, (0, 0, 0, 32 - Q))
    tiles = ttnn.reshape(put(heads), (1, 1, 32 * B, D), (1, 1, 32 * B, D))
    same(tiles, padded.reshape(1, 1, 32 * B, D))
    same(ttnn.reshape(tiles, (1, B, Q, D), (1, B, 32, D)), heads)


def test_write_through_a_view_reaches_the_tensor(put, same):
    x = bf16(1, 1, 64, 64)
    tensor = put(x)
    view = ttnn.reshape(tensor, (1, 2, 32, 64))
    assert view.buffer_address() == tensor.buffer_address()
    ttnn.copy(put(-x.reshape(1, 2, 32, 64)), view)
    same(tensor, -x)


def test_changing_a_tensor_leaves_its_copies_alone(put, same):
    x = bf16(1, 1, 32, 64)
    tensor = put(x, FP32)
    copies = [ttnn.clone(tensor), ttnn.to_memory_config(tensor, L1), ttnn.to_layout(tensor, ROW_MAJOR)]
    copies += [ttnn.reshape(ttnn.to_layout(tensor, ROW_MAJOR), (1, 2, 16, 64))]
    ttnn.copy(put(-x, FP32), tensor)
    for copied in copies:
        same(copied, x.reshape(tuple(copied.shape)))


@pytest.mark.parametrize("name, fill", [("zeros", 0), ("ones", 1), ("empty", 0), ("full", 3)])
def test_created_tensors_have_values(mesh_device, shadow, same, name, fill):
    arguments = [(1, 1, 32, 64)] + ([fill] if name == "full" else [])
    create = getattr(ttnn, name)
    tensor = create(arguments[0], *arguments[1:], dtype=BF16, layout=TILE, device=mesh_device)
    same(tensor, torch.full((1, 1, 32, 64), float(fill)))
    like = getattr(ttnn, f"{name}_like")
    same(like(tensor, *arguments[1:]), torch.full((1, 1, 32, 64), float(fill)))
    assert len(shadow.value(tensor)) == mesh_device.get_num_devices()


def test_arange_has_values(mesh_device, shadow, same):
    same(ttnn.arange(0, 64, 1, dtype=INT32, device=mesh_device), torch.arange(64), 0)


# ---- layers ---------------------------------------------------------------------------------------------------------


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


# ---- KV cache -------------------------------------------------------------------------------------------------------

POSITIONS = torch.tensor([100, 101, -1, 31, 32])


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


def test_output_tensor_receives_the_result(put, same):
    a, b = bf16(*X), bf16(*X)
    target = put(torch.zeros(X))
    ttnn.add(put(a), put(b), output_tensor=target)
    same(target, a + b)
    ttnn.add_(target, put(a))
    same(target, (a + b).bfloat16() + a, 2**-6)


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


# ---- host and device ------------------------------------------------------------------------------------------------


def test_values_survive_the_way_through_the_host(mesh_device, shadow, put, same, tmp_path):
    x = bf16(1, 1, 64, 96)
    host = ttnn.from_torch(x, dtype=BF16, layout=TILE)
    device = ttnn.to_device(host, mesh_device, memory_config=L1)
    same(device, x)
    same(host.to(mesh_device), x)
    back = ttnn.from_device(device)
    assert torch.equal(ttnn.to_torch(ttnn.get_device_tensors(back)[0]).float(), x)
    assert torch.equal(ttnn.to_torch(ttnn.get_device_tensors(device.cpu())[0]).float(), x)
    target = put(torch.zeros(1, 1, 64, 96))
    ttnn.copy_host_to_device_tensor(back, target)
    same(target, x)
    ttnn.dump_tensor(tmp_path / "x.tensorbin", device)
    same(ttnn.load_tensor(tmp_path / "x.tensorbin", device=mesh_device), x)
    cached = {"dtype": BF8, "layout": TILE, "device": mesh_device, "memory_config": DRAM}
    for _ in range(2):  # made, then read from the file
        same(ttnn.as_tensor(x, cache_file_name=tmp_path / "y", **cached), shadow.rounded(x, BF8), 0)


def test_sharded_tensors_survive_the_way_through_the_host(put, same):
    x = bf16(1, 1, 64, 32)
    tensor = put(x, memory_config=height_sharded(2, 32, 32))
    target = put(torch.zeros_like(x), memory_config=height_sharded(2, 32, 32))
    ttnn.copy_host_to_device_tensor(ttnn.from_device(tensor), target)
    same(target, x)


def test_printing_shows_the_shadow(put):
    assert "7.0" in repr(put(torch.full((1, 1, 32, 32), 7.0)))


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_shape_that_golden_and_ttnn_see_differently_is_an_error(put, shadow):
    k = v = put(bf16(1, KV, S, D))
    with pytest.raises(shadow.ShapeMismatch, match="ttnn infers"):  # ttnn forgets rows with share_cache
        ttnn.transformer.scaled_dot_product_attention_decode(
            put(bf16(1, B, Q, D)), k, v, cur_pos_tensor=put(POSITIONS.clamp(0)), share_cache=True
        )


def test_an_operation_without_golden_function_is_an_error(put):
    with pytest.raises(NotImplementedError, match="ttnn.experimental.dropout"):
        ttnn.experimental.dropout(put(bf16(1, 1, 32, 32)), probability=0.5, scale=2.0, seed=1)


@pytest.mark.parametrize("free", [ttnn.deallocate, lambda tensor: tensor.deallocate()], ids=["function", "method"])
def test_a_deallocated_tensor_has_no_values(put, shadow, free):
    tensor = put(bf16(1, 1, 32, 32))
    free(tensor)
    with pytest.raises(RuntimeError, match="deallocated"):
        shadow.value(tensor)


def test_a_tensor_from_before_the_shadows_is_an_error(mesh_device, shadow):
    shadow.uninstall()
    try:
        tensor = ttnn.from_torch(bf16(1, 1, 32, 32), dtype=BF16, layout=TILE, device=mesh_device)
    finally:
        shadow.install()
    with pytest.raises(RuntimeError, match="no shadow"):
        ttnn.silu(tensor)


def test_a_trace_is_an_error_instead_of_a_crash(mesh_device, shadow):
    with pytest.raises(NotImplementedError, match="trace"):
        ttnn.begin_trace_capture(mesh_device, cq_id=0)


def test_without_shadows_the_mock_reads_zeros(mesh_device, shadow):
    shadow.uninstall()
    try:
        tensor = ttnn.from_torch(torch.ones(1, 1, 32, 32), dtype=BF16, layout=TILE, device=mesh_device)
        assert ttnn.to_torch(ttnn.get_device_tensors(tensor)[0]).abs().sum() == 0
    finally:
        shadow.install()


def test_shadows_of_dropped_tensors_are_dropped(put, shadow):
    kept = put(bf16(1, 1, 32, 64))
    gc.collect()
    before = len(shadow._shadows)
    for _ in range(20):
        x = ttnn.silu(ttnn.reshape(ttnn.add(kept, kept), (1, 2, 16, 64)))
    del x
    assert len(shadow._shadows) == before


def test_dropped_tensors_free_device_memory(mesh_device, put):
    def free():
        return ttnn.get_memory_view(mesh_device, ttnn.BufferType.L1).total_bytes_free_per_bank

    before = free()
    tensor = put(bf16(1, 1, 256, 256), memory_config=L1)
    assert free() < before
    del tensor
    assert free() == before


# ---- meshes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def line(mesh_device):
    """(mesh, number of devices) of a board with several."""
    count = mesh_device.get_num_devices()
    if count == 1:
        pytest.skip("one device has no collectives")
    return mesh_device, count


def test_mesh_mappers_give_each_device_its_part(mesh_device, shadow):
    n = mesh_device.get_num_devices()
    x = bf16(1, 1, 32, 32 * n)

    def values(mapper):
        tensor = ttnn.from_torch(x, dtype=BF16, layout=TILE, device=mesh_device, mesh_mapper=mapper)
        read = [ttnn.to_torch(part).float() for part in ttnn.get_device_tensors(tensor)]
        assert len(read) == n and all(torch.equal(a, b) for a, b in zip(read, shadow.value(tensor), strict=True))
        return read

    shard = [ttnn.PlacementReplicate(), ttnn.PlacementShard(3)]
    for mapper in (
        ttnn.ShardTensorToMesh(mesh_device, dim=3),
        ttnn.ShardTensor2dMesh(mesh_device, dims=(None, 3), mesh_shape=tuple(mesh_device.shape)),
        ttnn.create_mesh_mapper(mesh_device, ttnn.MeshMapperConfig(shard)),
    ):
        assert torch.equal(torch.cat(values(mapper), 3), x)
    for mapper in (ttnn.ReplicateTensorToMesh(mesh_device), None):
        assert all(torch.equal(part, x) for part in values(mapper))


def test_host_shards_keep_their_part_on_the_way_to_the_mesh(mesh_device, shadow, tmp_path):
    x = bf16(1, 1, 32, 32 * mesh_device.get_num_devices())
    composer = ttnn.ConcatMeshToTensor(mesh_device, dim=3)
    host = ttnn.from_torch(x, dtype=BF16, layout=TILE, mesh_mapper=ttnn.ShardTensorToMesh(mesh_device, dim=3))
    device = ttnn.to_device(host, mesh_device)
    assert torch.equal(ttnn.to_torch(device, mesh_composer=composer).float(), x)
    assert torch.equal(ttnn.to_torch(ttnn.from_device(device), mesh_composer=composer).float(), x)
    placements = [str(tensor.tensor_topology().placements()) for tensor in (device, ttnn.from_device(device))]
    assert placements[0] == placements[1] and "Shard(3)" in placements[0]
    target = ttnn.zeros_like(device)
    ttnn.copy_host_to_device_tensor(host, target)
    assert torch.equal(ttnn.to_torch(target, mesh_composer=composer).float(), x)
    ttnn.dump_tensor(tmp_path / "x.tensorbin", device)
    loaded = ttnn.load_tensor(tmp_path / "x.tensorbin", device=mesh_device)
    assert torch.equal(ttnn.to_torch(loaded, mesh_composer=composer).float(), x)


def test_collectives_combine_the_devices(line, same):
    mesh, n = line
    x = bf16(1, 1, 32, 32 * n * n)
    tensor = ttnn.from_torch(x, dtype=BF16, layout=TILE, device=mesh, mesh_mapper=ttnn.ShardTensorToMesh(mesh, dim=3))
    parts = x.chunk(n, 3)
    same(ttnn.all_gather(tensor, dim=3), x, 0)
    same(ttnn.all_reduce(tensor), sum(parts))
    scattered = ttnn.reduce_scatter(tensor, dim=3)
    assert list(scattered.shape) == [1, 1, 32, 32]
    whole = ttnn.to_torch(scattered, mesh_composer=ttnn.ConcatMeshToTensor(mesh, dim=3)).float()
    torch.testing.assert_close(whole, sum(parts), rtol=2**-7, atol=2**-7)
    same(ttnn.all_gather(scattered, dim=3), sum(parts))


@pytest.mark.parametrize("mesh_device", [(2, 4)], indirect=True)
@pytest.mark.parametrize("axis", [0, 1])
def test_collectives_join_the_devices_along_one_axis(mesh_device, shadow, axis):
    x = bf16(2, 4, 32, 32)  # one tile for each device
    mapper = ttnn.ShardTensor2dMesh(mesh_device, dims=(0, 1), mesh_shape=(2, 4))
    tensor = ttnn.from_torch(x, dtype=FP32, layout=TILE, device=mesh_device, mesh_mapper=mapper)
    reduced = ttnn.all_reduce(tensor, cluster_axis=axis)
    gathered = ttnn.all_gather(tensor, dim=3, cluster_axis=axis)
    for device in range(8):
        row, column = divmod(device, 4)
        group = x[:, column] if axis == 0 else x[row]
        torch.testing.assert_close(shadow.value(reduced)[device][0, 0], group.sum(0))
        assert torch.equal(shadow.value(gathered)[device][0, 0], torch.cat(list(group), -1))


def test_a_gather_of_integers_is_exact(line, same):
    mesh, n = line
    x = torch.randint(0, 2**31 - 1, (1, 1, 32, 32 * n), dtype=torch.int32)
    mapper = ttnn.ShardTensorToMesh(mesh, dim=3)
    tensor = ttnn.from_torch(x, dtype=UINT32, layout=ROW_MAJOR, device=mesh, mesh_mapper=mapper)
    same(ttnn.all_gather(tensor, dim=3), x, 0)


def test_parallel_layer_equals_the_whole_layer(line, same):
    mesh, n = line
    x, up, down = bf16(1, 1, B, H), bf16(1, 1, H, 32 * n) / 16, bf16(1, 1, 32 * n, H) / 16

    def split(weight, dim):
        mapper = ttnn.ShardTensorToMesh(mesh, dim=dim)
        return ttnn.from_torch(weight, dtype=BF16, layout=TILE, device=mesh, mesh_mapper=mapper)

    rows = ttnn.from_torch(x, dtype=FP32, layout=TILE, device=mesh, mesh_mapper=ttnn.ReplicateTensorToMesh(mesh))
    y = ttnn.all_reduce(ttnn.linear(ttnn.linear(rows, split(up, 3)), split(down, 2)))
    same(y, x @ up @ down, 1e-3)


def test_each_device_updates_its_own_part_of_a_cache(line, shadow):
    mesh, n = line
    cache = ttnn.zeros((1, KV, S, D), dtype=BF16, layout=TILE, device=mesh)
    x = bf16(1, KV, 32, D * n)
    mapper = ttnn.ShardTensorToMesh(mesh, dim=3)
    ttnn.fill_cache(cache, ttnn.from_torch(x, dtype=BF16, layout=TILE, device=mesh, mesh_mapper=mapper), 0)
    for value, part in zip(shadow.value(cache), x.chunk(n, 3), strict=True):
        assert torch.equal(value[:, :, :32], part) and not value[:, :, 32:].any()


def test_submeshes_compute_for_themselves(fresh_mesh_device, line, shadow, same):
    n = line[1]
    left, right = fresh_mesh_device.create_submeshes(ttnn.MeshShape(1, n // 2))
    x = bf16(1, 1, 32, 32 * (n // 2))
    a = ttnn.from_torch(x, dtype=BF16, layout=TILE, device=left, mesh_mapper=ttnn.ShardTensorToMesh(left, dim=3))
    assert len(shadow.value(a)) == n // 2
    b = ttnn.zeros_like(ttnn.to_device(ttnn.from_device(a), right))
    ttnn.copy_host_to_device_tensor(ttnn.from_device(ttnn.neg(a)), b)
    assert torch.equal(ttnn.to_torch(b, mesh_composer=ttnn.ConcatMeshToTensor(right, dim=3)).float(), -x)
    if n > 2:
        same(ttnn.all_gather(b, dim=3), -x, 0)


# ---- a program of its own -------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch, ttnn
mesh = ttnn.open_mesh_device(ttnn.MeshShape(1, 1))
x = ttnn.from_torch(torch.full((1, 1, 32, 32), 3.0), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=mesh)
print(sys.argv[1:], ttnn.to_torch(ttnn.square(x)).sum().item())
ttnn.close_mesh_device(mesh)
"""


@pytest.mark.once
@pytest.mark.parametrize("as_module", [False, True])
def test_script_runs_on_a_mock_board_with_numbers(tmp_path, pytestconfig, as_module):
    (tmp_path / "squares.py").write_text(SCRIPT)
    program = ["-m", "squares"] if as_module else [str(tmp_path / "squares.py")]
    run = subprocess.run(
        [sys.executable, "-m", "models.board_mock", "N150", *program, "--size", "1b"],
        capture_output=True,
        text=True,
        cwd=pytestconfig.rootpath,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": f"{pytestconfig.rootpath}:{tmp_path}"},
    )
    assert run.stdout == "['--size', '1b'] 9216.0\n", run.stderr
    assert run.stderr == "mock board N150: numbers from golden functions, times mean nothing\n"
