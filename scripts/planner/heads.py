"""Drafters that read their target's hidden states: what a round computes, counted from the design, and its time.

No program is recorded here. Bytes follow from shapes and formats (`head_config`, the formats of a precision); programs
and exchanges from the arithmetic of `models.torch_llama.draft_head` and from the operations that the modules of
`models.ttnn_llama` spend on a norm, a matmul, a lookup, a layer. The layer itself is the target's, whose captured
counts are taken, and what a head's adds to it: the token's norm, a second half of q|k|v, and the sum of both products.

A round is one program. Beside the target's verification it has: the states of the rows verified last, kept by the
target and looked up; their fusion (`fc`); the layer on all K + 1 of those rows, as many as a round can add to the text;
the output matrix and argmax of the last one; K - 1 further steps of one row; the drafted ids joined for the target.

What a layer takes besides its bytes is the fit's. Programs beside the layer's own are most of a head's, and each is
priced as a layer's 27th part; of a draft model's forward those are not priced, as in the fit they are the host's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np

from models.boards import Board
from models.llama.config import LlamaConfig, named_config
from models.llama.head_config import HeadConfig, default_taps
from models.ttnn_llama.shapes import TILE, cache_length, padded_rows
from models.ttnn_llama.weights import memory
from models.ttnn_llama.weights.precision import Precision, bytes_per_value, precision_named
from models.ttnn_llama.weights.tensors import head_parts
from scripts.planner import fit
from scripts.planner.counts import Counts, Place, Work
from scripts.planner.predict import YEAR, Family, Pair, Times
from scripts.planner.published import fidelities_of

HEAD = "head"  # in place of a draft's size
DRAFT_VOCABULARY = 32_000  # of all heads published for Llama 3.x
BF16 = 2
LAYER_EXTRA = 3  # the token's norm, the state's half of q|k|v, the sum of both halves
PLUS_ONE = 2  # positions, in the cache and of the rope


@dataclass(frozen=True)
class Drafter:
    """A drafter that reads its target's hidden states, by what it computes in a round.

    Args:
        name: of its method.
        layers: like the target's.
        states: layers of the target that are read.
        vocabulary: ids that it can draft; None for all of the target's.
        one_pass: whether all tokens of a round come out of one forward, else each is a forward.
        joined: whether the first layer takes token and state side by side.
    """

    name: str
    layers: int
    states: int
    vocabulary: int | None
    one_pass: bool
    joined: bool


EAGLE3 = Drafter("EAGLE-3", 1, 3, DRAFT_VOCABULARY, one_pass=False, joined=True)
# amazon/*-p-eagle: four layers, the first as EAGLE-3's; K - 1 rows of a learnt state beside the rows fed again.
P_EAGLE = Drafter("P-EAGLE", 4, 3, DRAFT_VOCABULARY, one_pass=True, joined=True)
# z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat: five layers on five states, the target's embedding and output matrix.
DFLASH = Drafter("DFlash", 5, 5, None, one_pass=True, joined=False)


def head_config(target: LlamaConfig) -> HeadConfig:
    """The head that is published for targets of this shape: a layer like theirs, 32,000 ids, three states."""
    layer = replace(target, num_hidden_layers=1, tie_word_embeddings=False, bos_token_id=None, eos_token_ids=())
    return HeadConfig(layer, DRAFT_VOCABULARY, target.hidden_size, default_taps(target.num_hidden_layers))


ASSUMPTIONS = [
    "The head: one layer like its target's, three of the target's states fused, 32,000 ids; its operations are counted "
    "from its design, not recorded. A round is one program: K + 1 rows read again, K - 1 further steps, verification.",
    "Programs beside the layers are priced for a head, where they are more than the layer's; for a draft model they "
    "are not, as the fit has them in the host's time. So a head is not favoured beside a draft model.",
    "Acceptance was measured by others for heads of 8B, on GPUs with the target in bf16; that a board's formats, or a "
    "head of 3B or 1B, are accepted as often is assumed.",
]


# ---- what it does ---------------------------------------------------------------------------------------------------


def drafting(
    counts: Counts, place: Place, target: str, precision: str, drafter: Drafter, k: int, context: float
) -> Work:
    """All that a round of k drafted tokens does beside the target's verification."""
    config, named = named_config(target), precision_named(precision)
    design = _Design(config, named, place.chips, drafter)
    rows = rows_of(drafter, k)
    work = design.kept() + design.fused(padded_rows(k + 1)) + design.forward(counts, place, target, rows, context)
    if drafter.one_pass:
        return work + design.output(rows) + Work(_joining(k))
    work += design.picked() + design.output(1) + Work(_joining(k))
    step = design.forward(counts, place, target, 1, context) + design.output(1)
    return work + (k - 1) * step + Work(PLUS_ONE * max(k - 2, 0))


def rows_of(drafter: Drafter, k: int) -> int:
    """Rows of the forward that reads what the last round has added."""
    if drafter.one_pass:
        # Of P-EAGLE k - 1 more than are read again, of DFlash a block: the last token and k masks.
        return 2 * k if drafter.joined else 2 * (k + 1)
    return padded_rows(k + 1)


def _joining(k: int) -> int:
    """Programs that hand drafted ids to the target: the last token's and theirs looked up, joined and tilized, in place
    of the target's own lookup; with several, or with padding, the ids joined first."""
    padded = padded_rows(k + 1) > k + 1
    own = _lookup_programs(padded_rows(k + 1))
    return 5 - own + (k > 1 or padded) + padded


def _lookup_programs(rows: int) -> int:
    """Of a lookup in tiles: whole tiles are written at once, fewer rows are tilized after it."""
    return 1 if rows % TILE == 0 else 2


class _Design:
    """Works of the parts of a drafter beside a target. `other` bytes: a tile of 32 rows a column, read or written."""

    def __init__(self, config: LlamaConfig, precision: Precision, chips: int, drafter: Drafter):
        self.config, self.precision, self.chips, self.drafter = config, precision, chips, drafter
        self.hidden = config.hidden_size
        self.tiles = TILE * self.hidden * BF16  # bytes of a residual stream's tiles

    @property
    def vocabulary(self) -> int:
        return self.drafter.vocabulary or self.config.vocab_size

    def kept(self) -> Work:
        """The target writes its hidden states, for each that is read."""
        states = self.drafter.states
        return Work(programs=states, other=states * self.tiles)

    def fused(self, rows: int) -> Work:
        """States of rows looked up, and `fc`, whole on each chip: a product for each state, and their sum."""
        states, found = self.drafter.states, self._looked_up(rows)
        weights = states * self.hidden**2 * bytes_per_value(self.precision.attention)
        untilized = Work(programs=1, other=2 * self.tiles)
        return states * (untilized + found) + Work(programs=2 * states - 1, weights=weights)

    def forward(self, counts: Counts, place: Place, target: str, rows: int, context: float) -> Work:
        """The layers, with the tokens' embeddings and the rope's rows."""
        config, drafter = self.config, self.drafter
        layer, _ = counts.parts(place, target, self.precision.name, rows, context)
        width = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim / self.chips
        half = self.hidden * width * bytes_per_value(self.precision.attention)
        extra = Work(programs=LAYER_EXTRA, weights=half + BF16 * self.hidden) if drafter.joined else Work()
        rope = 2 * (_lookup_programs(2 * rows) + 1)  # cos and sin: looked up, and a row a core
        return drafter.layers * layer + extra + self._looked_up(rows) + Work(programs=rope)

    def picked(self) -> Work:
        """The last token's row of several: gathered from its cores, untilized, looked up."""
        return self._looked_up(1) + Work(programs=2, other=3 * self.tiles)

    def output(self, rows: int) -> Work:
        """Norm, output matrix, and argmax of rows."""
        vocabulary, chips = self.vocabulary, self.chips
        parts = head_parts(replace(self.config, vocab_size=vocabulary, bos_token_id=None, eos_token_ids=()), chips)
        own = vocabulary / chips
        tiles = TILE * own * BF16
        ids = rows * vocabulary * BF16
        other = tiles * (4 if parts > 1 else 2) + rows * own * BF16 + ids
        if chips > 1:
            other += rows * own * BF16 + ids
        return Work(
            programs=1 + 2 * parts + (parts > 1) + 2 + (chips > 1),
            exchanges=chips > 1,
            weights=self.hidden * own * bytes_per_value(self.precision.head) + BF16 * self.hidden,
            other=other,
        )

    def _looked_up(self, rows: int) -> Work:
        """Rows of a table as a residual stream: looked up, tilized, sharded."""
        moved = rows * self.hidden * BF16
        return Work(programs=_lookup_programs(rows) + 1, other=3 * moved + 2 * self.tiles)

    def extra_phases(self, forwards: int, fidelities: dict[str, str]) -> float:
        """Of each chip: tiles of weights times the phases beyond LoFi's, of so many forwards with an output each."""
        config, drafter = self.config, self.drafter
        q = config.num_attention_heads * config.head_dim
        qkv = q + 2 * config.num_key_value_heads * config.head_dim
        mlp = self.hidden * config.intermediate_size
        attention = drafter.layers * self.hidden * (q + qkv) + drafter.joined * self.hidden * qkv
        values = {
            "attention": forwards * attention / self.chips + drafter.states * self.hidden**2,
            "gate_up": forwards * drafter.layers * 2 * mlp / self.chips,
            "down": forwards * drafter.layers * mlp / self.chips,
            "head": forwards * self.hidden * self.vocabulary / self.chips,
        }
        return sum(values[name] / TILE**2 * (fit.PHASES[fidelity] - 1) for name, fidelity in fidelities.items())


# ---- its time -------------------------------------------------------------------------------------------------------


class HeadTimes(Times):
    """Times of a target and a drafter that reads its states, on the same chips: the drafting of a round is one figure.

    drafter: which. The pair's ``draft_precision`` is its precision.
    """

    drafter = EAGLE3

    def drafting(self, k: int) -> np.ndarray:
        """All that a round adds to the target's verification, but for the host."""
        if not k:
            return 0 * self.family.tail_ms
        pair, place, drafter = self.pair, self.pair.places["target"], self.drafter
        config, board = named_config(pair.target), self.board
        forwards = 1 if drafter.one_pass else k
        work = drafting(self.counts, place, pair.target, pair.draft_precision, drafter, k, pair.context)
        precision = precision_named(pair.draft_precision)
        fidelities = fidelities_of(precision)
        if pair.projections:
            fidelities |= dict.fromkeys(("attention", "gate_up", "down"), pair.projections)
        layers = forwards * drafter.layers
        own, _ = self.counts.parts(place, pair.target, pair.draft_precision, 1, pair.context)
        chip = fit.Chip(board.arch, board.dram_gb_per_s, place.chips, board.dram_banks, board.worker_cores)
        kv_heads = config.num_key_value_heads // place.chips * pair.attention_cores
        # Each forward reads the cache on its own cores: by the sum of its bytes over them.
        first, _ = self.counts.parts(place, pair.target, pair.draft_precision, rows_of(drafter, k), pair.context)
        cores = [max(1, min(rows * kv_heads, chip.cores)) for rows in (rows_of(drafter, k), 1)]
        reading = drafter.layers * (first.kv_cache / cores[0] + (forwards - 1) * own.kv_cache / cores[1])
        step = fit.Step(
            replace(work, kv_cache=reading),
            chip,
            layers,
            _Design(config, precision, place.chips, drafter).extra_phases(forwards, fidelities),
            config.head_dim,
            attention_cores=1,
            year=YEAR,
        )
        beside = work.programs - layers * own.programs
        programs = beside * self.family.program_ms(board.arch)
        return self.family.forward_ms(step) + programs + forwards * self.family.tail_ms

    def between(self, k: int) -> np.ndarray:
        """The host: all device programs of a round are in its drafting and its verification."""
        return self.family.host_ms


class PEagleTimes(HeadTimes):
    """Of P-EAGLE."""

    drafter = P_EAGLE


class DFlashTimes(HeadTimes):
    """Of DFlash."""

    drafter = DFLASH


def times_of(family: Family, counts: Counts, board: Board, pair: Pair) -> Times:
    """Times of a pair, whose draft is a model's size or `HEAD`."""
    return (HeadTimes if pair.draft == HEAD else Times)(family, counts, board, pair)


# ---- its memory -----------------------------------------------------------------------------------------------------


class HeadPlan(memory.MemoryPlan):
    """A head's memory, which changes as a head's does."""

    def changed(self, **changes: object) -> HeadPlan:
        """The same head with other values, as of `MemoryPlan.changed`."""
        asked = {name: getattr(self, name) for name in ("config", "precision", "chips", "max_seq_len", "dram_banks")}
        return memory_plan(traces=self.traces, **(asked | changes))


def memory_plan(
    config: HeadConfig, precision: Precision, chips: int, max_seq_len: int, traces: int, dram_banks: int
) -> HeadPlan:
    """What a head takes of each chip: its weights and cache, and its target's states, of a prompt until it is read."""
    layer = replace(config.layer, vocab_size=config.draft_vocab_size)
    like = memory.plan(layer, precision, chips, max_seq_len, traces, dram_banks=dram_banks)
    width = len(config.taps) * config.target_hidden_size
    states = BF16 * (cache_length(max_seq_len) * width + TILE * (width + config.hidden_size))
    values = {field.name: getattr(like, field.name) for field in fields(like)}
    values |= {"config": config, "weights": weight_bytes(config, precision, chips)}
    return HeadPlan(**(values | {"activations": like.activations + states}))


def weight_bytes(config: HeadConfig, precision: Precision, chips: int) -> int:
    """DRAM of each chip that a head's weights take: matrices as a target's, `fc` whole on each chip, and a table of the
    draft vocabulary's embeddings in bf16."""
    hidden = config.hidden_size
    shapes, own = config.tensor_shapes(), config.prefix
    formats = dict.fromkeys((f"{own}self_attn.{name}_proj.weight" for name in "qkvo"), precision.attention)
    formats |= dict.fromkeys((f"{own}mlp.{name}_proj.weight" for name in ("gate", "up")), precision.gate_up)
    formats |= {f"{own}mlp.down_proj.weight": precision.down, "lm_head.weight": precision.head}
    shared = sum(math.prod(shapes[name]) * bytes_per_value(format) for name, format in formats.items()) / chips
    fused = math.prod(shapes["fc.weight"]) * bytes_per_value(precision.attention)
    norms = sum(BF16 * shape[0] for name, shape in shapes.items() if len(shape) == 1 and name != "d2t")
    embeddings = BF16 * config.draft_vocab_size * hidden if config.reduced else 0
    return round(shared + fused + norms + embeddings)
