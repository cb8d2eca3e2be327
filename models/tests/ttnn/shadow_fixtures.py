"""Sizes, random numbers and references that the tests of shadow values share."""

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
X = (1, 1, 64, 96)  # any tensor
POSITIONS = torch.tensor([100, 101, -1, 31, 32])  # of B rows


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
