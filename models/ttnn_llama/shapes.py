"""Sizes that everything in this package agrees on. Importable where ttnn is not installed."""

TILE = 32
KV_BLOCK = 128  # cache lengths and prefill chunks are multiples of it, and so is every chunk of attention; a page
PREFILL_CHUNK = 1024  # positions of one prefill forward
# Rows a decode or verify forward is built for; other numbers are padded up. Heads are concatenated on a rectangle of
# cores, one row a core, at most 8 wide.
ROW_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)
MAX_ROWS = ROW_COUNTS[-1]
PREFILLS = ("chunks", "rows")  # how prompts are read: by prefill kernels, or by decode forwards of MAX_ROWS tokens
MAX_ATTENTION_CORES = 16  # that ttnn lets share one row and KV head in decode attention
HIDDEN = -(2.0**30)  # added to a score: no weight. A power of two is exact in every format, and finite times any scale


def padded_rows(n: int) -> int:
    """The smallest row count a forward is built for that holds n rows, 1 <= n <= 32."""
    return next(rows for rows in ROW_COUNTS if rows >= n)


def padded_prompt(n: int) -> int:
    """Positions that a chunk of n tokens takes in prefill."""
    return -(-n // KV_BLOCK) * KV_BLOCK


def pages_of(positions: int) -> int:
    """Pages of a paged cache that so many positions take."""
    return -(-positions // KV_BLOCK)


def pool_pages(slots: int, max_seq_len: int, pool: int | None) -> int:
    """Pages of a paged cache for so many sequences, of which all together may have `pool` positions; None: no less than
    each may have."""
    most = slots * pages_of(cache_length(max_seq_len))
    return most if pool is None else min(most, pages_of(pool))


def cache_length(max_seq_len: int) -> int:
    """Positions the KV cache reserves: room for a whole tile of rows at the last position, in whole blocks."""
    return -(-(max_seq_len + TILE) // KV_BLOCK) * KV_BLOCK
