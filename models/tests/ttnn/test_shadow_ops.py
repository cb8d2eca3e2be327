"""Shadow values: operations on tensors, their layouts and types, against plain torch."""

import pytest
import torch
import ttnn
from torch.nn import functional

from models.tests.ttnn.shadow_fixtures import (
    BF4,
    BF8,
    BF16,
    FP32,
    INT32,
    L1,
    ROW_MAJOR,
    SILU,
    TILE,
    UINT32,
    B,
    D,
    H,
    Q,
    X,
    bf16,
    height_sharded,
)

# ---- one tensor in, one out -----------------------------------------------------------------------------------------

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


def test_output_tensor_receives_the_result(put, same):
    a, b = bf16(*X), bf16(*X)
    target = put(torch.zeros(X))
    ttnn.add(put(a), put(b), output_tensor=target)
    same(target, a + b)
    ttnn.add_(target, put(a))
    same(target, (a + b).bfloat16() + a, 2**-6)


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
