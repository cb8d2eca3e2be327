"""How many positions the KV caches get: what fits into the memory that is free, by the configurations alone."""

from __future__ import annotations

from dataclasses import dataclass

from loguru import logger

from models.errors import OptionError, UserError
from models.llama.config import LlamaConfig
from models.llama.head_config import HeadConfig
from models.memory import free_bytes
from models.options import ResolvedOptions, describe_source
from models.torch_llama.kv_cache import KV_BLOCK, blocks_of
from models.torch_llama.working_set import Form, WorkingSet, working_set

# Bytes of one weight and of one number in the KV cache.
VALUE_BYTES = {"fp32": (4, 4), "bf16": (2, 2), "fp16": (2, 2), "int8": (1, 4)}
SPARE = 32  # positions beyond a sequence's own, at most: the rows of a forward
SPARE_SHARE = 0.1  # of the memory that is free: what a pool of several sequences leaves to all else

Config = LlamaConfig | HeadConfig


CPU = Form()


def weight_bytes(config: Config, dtype: str, form: Form = CPU) -> int:
    """Bytes of a model's, or a head's, weights. On a CPU a table of embeddings that is no output matrix stays in its
    file."""
    count = config.parameter_count
    if isinstance(config, LlamaConfig) and form.device == "cpu" and not config.tie_word_embeddings:
        count -= config.vocab_size * config.hidden_size
    return count * VALUE_BYTES[dtype][0]


def position_bytes(config: Config, dtype: str) -> int:
    """Bytes of one position in its KV cache."""
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return values * VALUE_BYTES[dtype][1]


def text_bytes(config: Config, dtype: str, max_seq_len: int) -> int:
    """Bytes of the pages of one text of so many positions."""
    return blocks_of(max_seq_len + SPARE) * KV_BLOCK * position_bytes(config, dtype)


@dataclass(frozen=True)
class Announced:
    """Bytes that a model takes with one text of the longest context.

    Args:
        weights: of the model.
        pages: of the text, whole ones.
        working: of its forwards, see `working_set`.
    """

    weights: int
    pages: int
    working: int

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.weights + self.pages + self.working

    def __str__(self) -> str:
        return (
            f"{_size(self.weights)} of weights, {_size(self.pages)} of KV cache and {_size(self.working)} to work with"
        )


def announced(config: Config, dtype: str, max_seq_len: int, form: Form = CPU) -> Announced:
    """What a model, or a head, takes, from the configuration alone; arguments as of `working_set`."""
    return Announced(
        weight_bytes(config, dtype, form),
        text_bytes(config, dtype, max_seq_len),
        working_set(config, dtype, max_seq_len, form).bytes,
    )


def form_of(options: ResolvedOptions) -> Form:
    """How models run with these options."""
    return Form(options.device, options.compiled, options.threads)


class CachePlan:
    """What a target's pool, a draft's cache and both models' forwards take beside the weights, on CPU or CUDA.

    The draft's cache holds every slot's longest sequence, whatever the pool: it may share fewer pages than the target,
    so that those of sequences that fit the pool might not fit one of the same size.

    Args:
        options: with every default filled in.
        target, draft: configurations; draft is None where nothing is loaded.
    """

    def __init__(self, options: ResolvedOptions, target: LlamaConfig, draft: Config | None) -> None:
        self.slots = options.slots
        self._form = form = form_of(options)
        self._target, self._draft = (target, options.dtype), (draft, options.draft_dtype) if draft else None
        self.weights = weight_bytes(target, options.dtype, form)
        self.drafts = draft is not None
        self._block = KV_BLOCK * position_bytes(target, options.dtype)
        self._draft_block, self._draft_longest = 0, 0
        if draft:
            self.weights += weight_bytes(draft, options.draft_dtype, form)
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
        return self.slots * blocks_of(self._drafted(max_seq_len) + SPARE) * self._draft_block

    def working(self, max_seq_len: int) -> int:
        """Of forwards, for such a context."""
        working: WorkingSet = working_set(*self._target, max_seq_len, self._form)
        if self._draft:
            working = working.beside(working_set(*self._draft, self._drafted(max_seq_len), self._form))
        return working.bytes

    def needs(self, max_seq_len: int, pool: int | None = None) -> int:
        """Of both caches and of forwards."""
        return self.bytes(max_seq_len, pool) + self.working(max_seq_len)

    def _drafted(self, max_seq_len: int) -> int:
        return min(max_seq_len, self._draft_longest or max_seq_len)

    def longest(self, room: int) -> int:
        """The longest context of which one sequence fits into so many bytes; 0: none does."""
        low, high = 0, room // self._block * KV_BLOCK
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.needs(middle, middle) <= room else (low, middle - 1)
        return low

    def pool(self, max_seq_len: int, room: int) -> int:
        """The largest pool for such a context that fits into so many bytes."""
        room -= self.draft_bytes(max_seq_len) + self.working(max_seq_len)
        return room // self._block * KV_BLOCK - SPARE


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
    if plan.needs(max_seq_len, max_seq_len) > room:
        raise _too_long(plan, options, name, max_seq_len, free)
    if asked is not None:
        if plan.needs(max_seq_len, pool) > room:
            raise OptionError(
                f"[pool_size] {asked} needs {_size(plan.bytes(max_seq_len, pool))} of KV cache beside "
                f"{_size(plan.weights)} of weights and {_size(plan.working(max_seq_len))} to work with, and "
                f"{options.device} has {_size(free)} free: lower it to {plan.pool(max_seq_len, room)}"
            )
        return pool
    room -= int(SPARE_SHARE * free)
    if options.slots == 1 or plan.needs(max_seq_len) <= room:
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
        f"[max_seq_len] {max_seq_len} needs {_size(plan.bytes(max_seq_len, max_seq_len))} of KV cache and "
        f"{_size(plan.working(max_seq_len))} to work with, {needs}, and {options.device} has {_size(free)} free: lower "
        f"[max_seq_len] to {fits}{fewer}"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
