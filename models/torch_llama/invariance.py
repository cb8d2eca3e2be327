"""Whether the bits of a row depend on how many rows are computed with it, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from models.torch_llama.attention import Attention, Part
from models.torch_llama.kv_cache import KV_BLOCK, KVCache

MANY, SEVERAL, FEW = 130, 33, (2, 3, 5, 8, 16)
SOME, BLOCKS = (1, 2, 3, 5, 8, 11, 16, 33), 6


def least_alike(
    linears: Sequence[tuple[Callable, int]], head: tuple[Callable, int], attention: Attention
) -> int | None:
    """How many rows a forward must have for each to have the bits that it has among any number of others.

    1 or 2: a single row may be computed by another kernel than several are. None: no such number was found. Tried on
    random numbers, not guessed. Of attention as many rows are computed as `Attention` pads to.

    Args:
        linears: matrices of one layer, [n, in] -> [n, out], and the width of each one's rows.
        head: the same of the output matrix, which never gets as many rows as a prompt has.
        attention: of the model.
    """
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(attention.dtype)

    least = 1
    for (linear, width), most in (*((each, MANY) for each in linears), (head, SEVERAL)):
        x = noise(most, width)
        expected = linear(x)
        if not all(torch.equal(linear(x[:n]), expected[:n]) for n in (*FEW, SEVERAL)):
            return None
        least = least if torch.equal(linear(x[:1]), expected[:1]) else 2
    _, width, _, dim = attention.cache.pool.shape
    cache = KVCache(
        *(1, width, dim), dtype=attention.dtype, device=attention.device, slots=1, positions=BLOCKS * KV_BLOCK, spare=0
    )
    trial = Attention(cache, attention.streams, attention.fold)
    table = cache.write(0, 0, BLOCKS * KV_BLOCK)
    kv = cache.pool[0]
    for block in range(1, BLOCKS):
        kv.copy_(noise(*kv.shape))
        queries = noise(KV_BLOCK, attention.streams * attention.fold * dim)
        start = block * KV_BLOCK
        expected = trial.attend(kv, queries, trial.together([Part(table, start, KV_BLOCK, KV_BLOCK)]))
        for n in SOME:
            for row in (0, KV_BLOCK - n):
                found = trial.attend(kv, queries[row : row + n], trial.together([Part(table, start + row, n, n)]))
                if not torch.equal(found, expected[row : row + n]):
                    return None
    return least
