"""How many positions the KV caches get: what fits into the memory that is free, by the configurations alone."""

from __future__ import annotations

from loguru import logger

from models.errors import OptionError, UserError
from models.llama.config import LlamaConfig
from models.llama.head_config import HeadConfig
from models.memory import free_bytes
from models.options import ResolvedOptions, describe_source
from models.torch_llama.kv_cache import KV_BLOCK, blocks_of

# Bytes of one weight and of one number in the KV cache.
VALUE_BYTES = {"fp32": (4, 4), "bf16": (2, 2), "fp16": (2, 2), "int8": (1, 4)}
SPARE = 32  # positions beyond a sequence's own, at most: the rows of a forward
WORKING_SHARE = 0.1  # of the memory that is free: what a pool of several sequences leaves to all else

Config = LlamaConfig | HeadConfig


def weight_bytes(config: Config, dtype: str) -> int:
    """Bytes of a model's, or a head's, weights."""
    return config.parameter_count * VALUE_BYTES[dtype][0]


def position_bytes(config: Config, dtype: str) -> int:
    """Bytes of one position in its KV cache."""
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return values * VALUE_BYTES[dtype][1]


class CachePlan:
    """What a target's pool and a draft's cache take beside the weights, on CPU or CUDA.

    The draft's cache holds every slot's longest sequence, whatever the pool: it may share fewer pages than the target,
    so that those of sequences that fit the pool might not fit one of the same size.

    Args:
        options: with every default filled in.
        target, draft: configurations; draft is None where nothing is loaded.
    """

    def __init__(self, options: ResolvedOptions, target: LlamaConfig, draft: Config | None) -> None:
        self.slots = options.slots
        self.weights = weight_bytes(target, options.dtype)
        self.drafts = draft is not None
        self._block = KV_BLOCK * position_bytes(target, options.dtype)
        self._draft_block, self._draft_longest = 0, 0
        if draft:
            self.weights += weight_bytes(draft, options.draft_dtype)
            self._draft_block = KV_BLOCK * position_bytes(draft, options.draft_dtype)
            self._draft_longest = draft.max_position_embeddings if isinstance(draft, LlamaConfig) else 0

    def bytes(self, max_seq_len: int, pool: int | None = None) -> int:
        """Of both caches, for such a context and pool (default: max_seq_len for each slot)."""
        blocks = self.slots * blocks_of(max_seq_len + SPARE)
        if pool is not None:
            blocks = min(blocks, blocks_of(pool + SPARE))
        return blocks * self._block + self.draft_bytes(max_seq_len)

    def draft_bytes(self, max_seq_len: int) -> int:
        """Of the draft's cache alone."""
        longest = min(max_seq_len, self._draft_longest or max_seq_len)
        return self.slots * blocks_of(longest + SPARE) * self._draft_block

    def longest(self, room: int) -> int:
        """The longest context of which one sequence fits into so many bytes; 0: none does."""
        low, high = 0, room // self._block * KV_BLOCK
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes(middle, middle) <= room else (low, middle - 1)
        return low

    def pool(self, max_seq_len: int, room: int) -> int:
        """The largest pool for such a context that fits into so many bytes."""
        return (room - self.draft_bytes(max_seq_len)) // self._block * KV_BLOCK - SPARE


def asked_pool(asked: int | None, slots: int, max_seq_len: int) -> int | None:
    """Positions of all sequences together, as asked for; None: as many as all slots may have.

    Raises UserError for a pool that cannot hold one sequence.
    """
    if asked is not None and asked < max_seq_len:
        raise OptionError(
            f"[pool_size] {asked} cannot hold one text of [max_seq_len] {max_seq_len}: raise it, or lower [max_seq_len]"
        )
    return None if asked is None or asked >= slots * max_seq_len else asked


def choose_pool(
    options: ResolvedOptions, source: str, target: LlamaConfig, draft: Config | None, max_seq_len: int
) -> int | None:
    """Positions of all sequences together; None: as many as all slots may have.

    Args:
        options: with every default filled in, for CPU or CUDA.
        source: the target's name.
        target, draft: configurations.
        max_seq_len: positions of a sequence.

    Raises:
        UserError: for a context, or a pool, that the memory that is free cannot hold, and for a pool that cannot hold
            one sequence.
    """
    asked = options.pool_size
    pool = asked_pool(asked, options.slots, max_seq_len)
    free = free_bytes(options.device)
    if free is None:
        return pool
    plan = CachePlan(options, target, draft)
    room, name = free - plan.weights, describe_source(source)
    if plan.bytes(max_seq_len, max_seq_len) > room:
        raise _too_long(plan, options, name, max_seq_len, free)
    if asked is not None:
        if (needed := plan.bytes(max_seq_len, pool)) > room:
            raise OptionError(
                f"[pool_size] {asked} needs {_size(needed)} of KV cache beside {_size(plan.weights)} of weights, and "
                f"{options.device} has {_size(free)} free: lower it to {plan.pool(max_seq_len, room)}"
            )
        return pool
    room -= int(WORKING_SHARE * free)
    if options.slots == 1 or plan.bytes(max_seq_len) <= room:
        return None
    fits = max(max_seq_len, plan.pool(max_seq_len, room))
    logger.info(
        f"the KV cache holds {fits} positions of all texts together, {options.slots} times {max_seq_len} do not fit "
        f"into the {_size(free)} that are free: texts wait where it is full"
    )
    return fits


def _too_long(plan: CachePlan, options: ResolvedOptions, name: str, max_seq_len: int, free: int) -> UserError:
    """Not even one sequence fits."""
    needs = f"{name}{' with its draft' if plan.drafts else ''} needs {_size(plan.weights)} of weights"
    fits = plan.longest(free - plan.weights)
    if fits < 2:
        return OptionError(
            f"{needs} in {options.dtype}, and {options.device} has {_size(free)} free: use a smaller model or [dtype]"
        )
    fewer = ", or give fewer [slots]" if options.slots > 1 and plan.drafts else ""
    return OptionError(
        f"[max_seq_len] {max_seq_len} needs {_size(plan.bytes(max_seq_len, max_seq_len))} of KV cache, {needs}, "
        f"and {options.device} has {_size(free)} free: lower [max_seq_len] to {fits}{fewer}"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
