"""Whether the bits of a row depend on how many rows are computed with it, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from models.torch_llama.attention import Attention, Part
from models.torch_llama.kv_cache import KV_BLOCK, KVCache

MANY, SEVERAL, FEW = 130, 33, (2, 3, 8)
SOME = (1, 3, 8)


def rows_alike(linears: Sequence[tuple[Callable, int]], head: tuple[Callable, int], attention: Attention) -> bool:
    """Whether rows have the same bits in any company: tried on random numbers, not guessed.

    Of matrices at least two rows are computed, of attention as many as `Attention` pads to.

    Args:
        linears: matrices of one layer, [n, in] -> [n, out], and the width of each one's rows.
        head: the same of the output matrix, which never gets as many rows as a prompt has.
        attention: of the model.
    """
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(attention.dtype)

    for (linear, width), most in (*((each, MANY) for each in linears), (head, SEVERAL)):
        x = noise(most, width)
        expected = linear(x)
        if not all(torch.equal(linear(x[:n]), expected[:n]) for n in (*FEW, SEVERAL)):
            return False
    _, width, _, dim = attention.cache.pool.shape
    cache = KVCache(
        *(1, width, dim), dtype=attention.dtype, device=attention.device, slots=1, positions=2 * KV_BLOCK, spare=0
    )
    trial = Attention(cache, attention.streams, attention.fold, attention.least)
    table = cache.write(0, 0, 2 * KV_BLOCK)
    kv = cache.pool[0]
    kv.copy_(noise(*kv.shape))
    queries = noise(KV_BLOCK, attention.streams * attention.fold * dim)
    expected = trial.attend(kv, queries, trial.together([Part(table, KV_BLOCK, KV_BLOCK, KV_BLOCK)]))
    for n in SOME:
        for row in (0, KV_BLOCK - n):
            found = trial.attend(kv, queries[row : row + n], trial.together([Part(table, KV_BLOCK + row, n, n)]))
            if not torch.equal(found, expected[row : row + n]):
                return False
    return True
