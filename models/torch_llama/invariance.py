"""Whether the bits of a row depend on how many rows are computed with it, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias

import torch

from models.torch_llama.attention import Attention, Part
from models.torch_llama.kv_cache import KV_BLOCK, KVCache
from models.torch_llama.linear import Linear

MANY, SEVERAL, FEW = 130, 33, (2, 3, 5, 8, 16)
SOME, BLOCKS = (1, 2, 3, 5, 8, 11, 16, 33), 6
# A kernel that sums in another order shows in one of some thousand numbers of 16 bits: so many are tried of each
# matrix, in some rows at least. Of a large matrix a few rows are enough, and loading it does not wait for more. In fp32
# it shows in half of all numbers (sums of 8 to 2048 products, forwards, backwards, in halves or in lanes): fewer rows
# are enough of a narrow matrix too.
NUMBERS, LEAST_TRIED = 5e5, 4
NUMBERS_FP32 = 2e4


Key: TypeAlias = tuple[Hashable, ...]
_tried: dict[Key, list[bool] | None] = {}


def odd_alone(
    linears: Sequence[tuple[Linear, int]], head: tuple[Linear, int], attention: Attention
) -> list[bool] | None:
    """Of each matrix, the head last, whether a single row has other bits than among others. Tried, not guessed.

    Which kernel computes a matrix goes by its form and size: in a process, what was tried holds for all models alike.

    None: rows depend on their number even where they are several, or attention's do with the rows that it pads to.

    Args:
        linears: matrices of one layer, [n, in] -> [n, out], and the width of each one's rows.
        head: the same of the output matrix, which never gets as many rows as a prompt has.
        attention: of the model.
    """
    key = _alike_models(linears, head, attention)
    if key not in _tried:
        _tried[key] = _try(linears, head, attention)
    return _tried[key]


def _alike_models(linears: Sequence[tuple[Linear, int]], head: tuple[Linear, int], attention: Attention) -> Key:
    """What the choice of kernels goes by."""
    matrices = [(type(linear), linear.bytes, linear.form, width) for linear, width in (*linears, head)]
    sizes = (attention.cache.pool.shape[1], attention.cache.pool.shape[3], attention.streams, attention.fold)
    return (*matrices, sizes, attention.dtype, attention.device, torch.get_num_threads())


def _try(linears: Sequence[tuple[Linear, int]], head: tuple[Linear, int], attention: Attention) -> list[bool] | None:
    noise = seeded_noise(attention.dtype)
    odd = odd_matrices([*((*each, MANY) for each in linears), (*head, SEVERAL)], noise)
    return odd if odd is not None and _attention_alike(attention, noise) else None


def odd_matrices(linears: Sequence[tuple[Callable, int, int]], noise: Callable[..., torch.Tensor]) -> list[bool] | None:
    """As `odd_alone`, without attention: of each matrix, the width of its rows and the most rows that it gets."""
    odd = []
    for linear, width, most in linears:
        made = linear(noise(2, width))
        tried = max(LEAST_TRIED, int(NUMBERS / made.shape[1]))
        if made.dtype == torch.float32:
            tried = min(tried, max(SEVERAL, int(NUMBERS_FP32 / made.shape[1])))
        x = noise(max(most, tried), width)
        expected = linear(x)
        if not all(_alike(linear, x[: max(n, min(tried, SEVERAL))], expected, n) for n in (*FEW, SEVERAL)):
            return None
        odd.append(not _alike(linear, x[:tried], expected, 1))
    return odd


def seeded_noise(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Shape -> the next random numbers of one stream."""
    random = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=random).to(dtype)


def _alike(linear: Callable, x: torch.Tensor, expected: torch.Tensor, n: int) -> bool:
    """Whether n rows computed together have the bits expected, for all rows of x [rows, in] in turn."""
    starts = range(0, len(x) - n + 1, n)
    return all(torch.equal(linear(x[start : start + n]), expected[start : start + n]) for start in starts)


def _attention_alike(attention: Attention, noise: Callable[..., torch.Tensor]) -> bool:
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
                    return False
    return True
