"""How much memory of each chip a model takes, known before a board is opened or a weight is read; what would fit.

Bytes are the allocator's: a buffer is dealt out over the DRAM banks of a chip and takes as much in each of them as in
the fullest, and a matrix has blocks of whole tiles. Importable where ttnn is not installed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from models.boards import BOARDS, PLACEMENTS, Board
from models.errors import UserError
from models.llama.config import LlamaConfig
from models.llama.head_config import HeadConfig
from models.ttnn_llama.shapes import KV_BLOCK, PREFILL_CHUNK, TILE, cache_length, pool_pages
from models.ttnn_llama.weights.head_tensors import drafting_config, head_specs
from models.ttnn_llama.weights.precision import PRECISIONS, Precision, tile_bytes
from models.ttnn_llama.weights.tensors import MESH_SIZES, WeightSpec, weight_specs

SMALLEST_CONTEXT = 128  # a shorter one is no advice
COLUMNS = ("model", "precision", "weights", "KV cache", "activations", "traces", "total")
_BF16 = 2


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each chip's DRAM that one model takes, and what they were computed for."""

    weights: int
    kv_cache: int
    activations: int  # an upper bound: rope tables, and the largest forward's tensors as if none were freed
    traces: int
    config: LlamaConfig | HeadConfig
    precision: Precision
    chips: int
    max_seq_len: int
    dram_banks: int
    slots: int = 1  # sequences
    pool: int | None = None  # positions of all of them together; None: max_seq_len for each

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.traces

    def changed(self, **changes: object) -> MemoryPlan:
        """The same model with another ``precision``, ``chips``, ``max_seq_len``, ``dram_banks``, ``slots`` or ``pool``.

        Raises UserError as `plan` does.
        """
        names = ("config", "precision", "chips", "max_seq_len", "dram_banks", "slots", "pool")
        asked = {name: getattr(self, name) for name in names} | changes
        return plan(
            asked["config"],
            asked["precision"],
            asked["chips"],
            asked["max_seq_len"],
            self.traces,
            dram_banks=asked["dram_banks"],
            slots=asked["slots"],
            pool=asked["pool"],
        )


def plan(
    config: LlamaConfig | HeadConfig,
    precision: Precision,
    board_chips: int,
    max_seq_len: int,
    trace_bytes: int,
    *,
    dram_banks: int = 12,
    slots: int = 1,
    pool: int | None = None,
) -> MemoryPlan:
    """What a model, or a draft head, takes of each of ``board_chips`` chips that share it.

    ``dram_banks`` is the board's (12 on Wormhole, 8 on Blackhole), ``trace_bytes`` the size of the trace region,
    ``slots`` the sequences that the cache has pages for: with ``pool`` positions together, else max_seq_len each.
    Raises UserError if the model cannot be split over so many chips.
    """
    positions = cache_length(max_seq_len)
    if isinstance(config, HeadConfig):
        specs, layer = head_specs(config, board_chips, precision), drafting_config(config)
        activations = _kept_states(config, positions) + _activations(layer, board_chips, positions)
    else:
        specs, layer = weight_specs(config, board_chips, precision), config
        activations = _activations(config, board_chips, positions)
    return MemoryPlan(
        weights=sum(weight_bytes(spec, board_chips, dram_banks) for spec in specs),
        kv_cache=kv_cache_bytes(layer, precision, board_chips, max_seq_len, dram_banks, slots, pool),
        activations=activations,
        traces=trace_bytes,
        config=config,
        precision=precision,
        chips=board_chips,
        max_seq_len=max_seq_len,
        dram_banks=dram_banks,
        slots=slots,
        pool=pool,
    )


def weight_bytes(spec: WeightSpec, chips: int, dram_banks: int) -> int:
    """DRAM that one weight takes on each of ``chips`` chips."""
    *_, rows, columns = spec.local_shape(chips)
    if spec.dram_sharded:
        tiles_per_bank = rows // TILE * math.ceil(columns / (TILE * dram_banks))
        return dram_banks * tiles_per_bank * tile_bytes(spec.format)
    return _dealt(rows, columns * _BF16, dram_banks)  # one row a page


def kv_cache_bytes(
    config: LlamaConfig,
    precision: Precision,
    chips: int,
    max_seq_len: int,
    dram_banks: int,
    slots: int = 1,
    pool: int | None = None,
) -> int:
    """DRAM that the KV cache takes on each of ``chips`` chips: pages for all positions of all slots, or of a pool."""
    heads = config.num_key_value_heads // chips
    tiles = heads * pool_pages(slots, max_seq_len, pool) * KV_BLOCK * config.head_dim // TILE**2
    return 2 * config.num_hidden_layers * _dealt(tiles, tile_bytes(precision.kv_cache), dram_banks)


def _dealt(pages: int, page_bytes: int, banks: int) -> int:
    """Bytes of an interleaved buffer: pages go to the banks in turn, all banks reserve what the fullest takes."""
    return math.ceil(pages / banks) * banks * page_bytes


def _activations(config: LlamaConfig, chips: int, positions: int) -> int:
    """Everything beside weights, cache and traces, as if nothing were freed within a layer."""
    hidden, ffn = config.hidden_size, config.intermediate_size // chips
    q_width = config.num_attention_heads * config.head_dim // chips
    qkv_width = q_width + 2 * config.num_key_value_heads * config.head_dim // chips
    # the residual stream before and after, normed, block's output; qkv as one, as heads, rotated; attended and joined
    # heads; gate, up and their product
    attention = 4 * hidden + 3 * qkv_width + 2 * q_width
    mlp = 4 * hidden + 3 * ffn
    # reduce-scatter works in a buffer of twice its input, then its results are gathered
    collective = 3 * hidden if chips > 1 else 0
    prefill = min(PREFILL_CHUNK, positions) * (max(attention, mlp) + collective)
    # logits of a verification: in pieces, joined and untilized on each chip, then gathered
    logits = TILE * (3 * config.vocab_size // chips + config.vocab_size)
    rope = 4 * positions * config.head_dim  # cos and sin, for lookups and for ranges
    return _BF16 * (max(prefill, logits) + rope)


def _kept_states(config: HeadConfig, positions: int) -> int:
    """What the target leaves for a head on each chip: a prompt's hidden states until they are read, the rows of a
    forward; and what the head makes of a prompt's beside a layer's own tensors."""
    width = len(config.taps) * config.target_hidden_size
    rows = TILE * (width + config.hidden_size)
    fused = min(PREFILL_CHUNK, positions) * (2 * width + 2 * len(config.taps) * config.hidden_size)
    return _BF16 * (positions * width + rows + fused)


# ---- does it fit? ---------------------------------------------------------------------------------------------------


def check_fit(board: Board, plans: Mapping[str, MemoryPlan], placement: str = "shared") -> None:
    """UserError unless ``plans`` ("target" and, if there is one, "draft") fit into each chip of ``board``.

    With ``placement`` "shared" every chip holds its parts of both models, with "own-chip" of one. The error says what
    is missing and what would fit: each remedy in it has been computed.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement {placement!r} is none of {', '.join(PLACEMENTS)}")
    names, need = _largest(plans, placement)
    if need <= board.dram_bytes:
        return
    parts = [
        f"{what} {sum(getattr(plans[name], field) for name in names) / 1e9:.2f}"
        for field, what in (("weights", "weights"), ("kv_cache", "KV cache"), ("activations", "activations"))
    ]
    traces = sum(plans[name].traces for name in names) / 1e9
    remedies = list(_remedies(board, plans, placement))
    raise UserError(
        f"{' and '.join(names)} need{'s' * (len(names) == 1)} {need / 1e9:.2f} GB of each chip's DRAM "
        f"({', '.join(parts)}, traces {traces:.2f}), a chip of {board.name} has {board.dram_bytes / 1e9:.2f} GB, "
        f"{(need - board.dram_bytes) / 1e9:.2f} GB too little: "
        + (
            f"use {', or '.join(remedies)}"
            if remedies
            else "no context, precision or board here fits, use a smaller model"
        )
    )


def _largest(plans: Mapping[str, MemoryPlan], placement: str) -> tuple[list[str], int]:
    """Which models lie on the fullest chip, and how many bytes they take there."""
    if placement == "shared":
        return list(plans), sum(plan.total for plan in plans.values())
    name = max(plans, key=lambda name: plans[name].total)
    return [name], plans[name].total


def _fits(board: Board, plans: Mapping[str, MemoryPlan], placement: str) -> bool:
    return _largest(plans, placement)[1] <= board.dram_bytes


def _remedies(board: Board, plans: Mapping[str, MemoryPlan], placement: str) -> Iterator[str]:
    """What would fit, from the smallest change to the largest."""
    context = _largest_context(board, plans, placement)
    if context:
        yield f"--max-seq-len {context}"
    pool = _largest_pool(board, plans, placement)
    if pool:
        yield f"--pool-size {pool}"
    slots = _most_slots(board, plans, placement)
    if slots:
        yield f"{slots} slot{'s' * (slots > 1)}"
    lower = list(_lower_precisions(plans))
    fitting = next((label for label, changed in lower if _fits(board, changed, placement)), None)
    if fitting:
        yield fitting
    if not context and not fitting:
        for label, changed in lower:
            context = _largest_context(board, changed, placement)
            if context:
                yield f"{label} with --max-seq-len {context}"
                break
    if "draft" in plans and _fits(board, {"target": plans["target"]}, placement):
        yield "no draft"
    if _fits(board, {name: dataclasses.replace(plan, traces=0) for name, plan in plans.items()}, placement):
        yield "--no-trace"
    for other in sorted(BOARDS.values(), key=lambda other: other.chips * other.dram_bytes):
        moved = _moved(other, plans, placement)
        if other != board and moved and _fits(other, moved, placement):
            yield f"a board like {other.title}"
            break


def _largest_context(board: Board, plans: Mapping[str, MemoryPlan], placement: str) -> int | None:
    """The most tokens, of what is asked for, that fit: 32 below whole blocks, since a verification needs 32 more."""

    def fits(blocks: int) -> bool:
        length = blocks * KV_BLOCK - TILE
        shorter = {name: plan.changed(max_seq_len=min(plan.max_seq_len, length)) for name, plan in plans.items()}
        return _fits(board, shorter, placement)

    low, high = 1, max(cache_length(plan.max_seq_len) for plan in plans.values()) // KV_BLOCK  # high does not fit
    if not fits(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    context = low * KV_BLOCK - TILE
    return context if context >= SMALLEST_CONTEXT else None


def _largest_pool(board: Board, plans: Mapping[str, MemoryPlan], placement: str) -> int | None:
    """The most positions of the target's texts together that fit, of one context at least; None: not so many, or one
    text has the whole cache."""
    target = plans["target"]

    def fits(pages: int) -> bool:
        return _fits(board, {**plans, "target": target.changed(pool=pages * KV_BLOCK)}, placement)

    low, high = -(-target.max_seq_len // KV_BLOCK), pool_pages(target.slots, target.max_seq_len, target.pool)
    if target.slots == 1 or low >= high or not fits(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * KV_BLOCK


def _most_slots(board: Board, plans: Mapping[str, MemoryPlan], placement: str) -> int | None:
    """The most slots, below those that are asked for, that fit with their whole context; None: not even one."""
    for slots in range(max(plan.slots for plan in plans.values()) - 1, 0, -1):
        fewer = {name: plan.changed(slots=min(slots, plan.slots)) for name, plan in plans.items()}
        if _fits(board, fewer, placement):
            return slots
    return None


def _lower_precisions(plans: Mapping[str, MemoryPlan]) -> Iterator[tuple[str, dict[str, MemoryPlan]]]:
    """The draft alone in the lowest precision first, since it cannot change the text; then both, step by step."""
    order = list(PRECISIONS.values())

    def lowered(plan: MemoryPlan, precision: Precision) -> MemoryPlan:
        lower = order.index(precision) > order.index(PRECISIONS[plan.precision.name])
        return plan.changed(precision=precision) if lower else plan

    lowest = order[-1]
    if "draft" in plans and plans["draft"].precision.name != lowest.name:
        yield f"--draft-precision {lowest.name}", {**plans, "draft": lowered(plans["draft"], lowest)}
    for precision in order[1:]:
        changed = {name: lowered(plan, precision) for name, plan in plans.items()}
        if changed != dict(plans):
            flags = {"target": "--precision", "draft": "--draft-precision"}
            yield " ".join(f"{flags[name]} {plan.precision.name}" for name, plan in changed.items()), changed


def _moved(board: Board, plans: Mapping[str, MemoryPlan], placement: str) -> dict[str, MemoryPlan] | None:
    """The same models on another board, None if they cannot be split over its chips."""
    own_chip = placement == "own-chip" and "draft" in plans
    sizes = [size for size in MESH_SIZES if size < board.chips] if own_chip else [board.chips]
    for size in reversed(sizes):
        try:
            chips = {name: 1 if own_chip and name == "draft" else size for name in plans}
            return {n: p.changed(chips=chips[n], dram_banks=board.dram_banks) for n, p in plans.items()}
        except UserError:
            continue
    return None


def rows(plans: Mapping[str, MemoryPlan]) -> list[tuple[str, ...]]:
    """A table of ``plans`` as text, under COLUMNS: a row for each model, in GB per chip."""

    def gigabytes(*sizes: int) -> tuple[str, ...]:
        return tuple(f"{size / 1e9:.2f} GB" for size in sizes)

    return [
        (name, p.precision.name, *gigabytes(p.weights, p.kv_cache, p.activations, p.traces, p.total))
        for name, p in plans.items()
    ]
