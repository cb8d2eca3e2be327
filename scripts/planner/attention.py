"""What attention to long contexts costs a verification of one text, by how keys and values are read.

Only the ways that have been looked at on mock boards (docs/batching.md); none but the decode kernel is used. All
predicted by the planner's model of step time, in which a core takes as long for a block of 128 positions whatever it
does with it: so what counts is how many blocks one core reads, not how many bytes the chip does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from models.boards import BOARDS, Board
from models.llama.config import LlamaConfig, named_config
from models.ttnn_llama.shapes import MAX_ATTENTION_CORES
from models.ttnn_llama.weights.precision import PRECISION, precision_named
from scripts.planner import fit
from scripts.planner.counts import Counts, Place, Work, places
from scripts.planner.predict import YEAR, Family
from scripts.planner.published import extra_phases, fidelities_of

SIZE, ROWS, CONTEXTS = "8B", 8, (1024, 8192)


@dataclass(frozen=True)
class Way:
    """A way of reading the cache.

    rows: of the forward. reads: how often each block is read. cores: that read, all together.
    """

    name: str
    rows: int
    reads: float
    cores: int


def ways(config: LlamaConfig, chips: int, worker_cores: int) -> list[Way]:
    """Plain decoding as it is, the ways a verification could take, and what plain decoding would be in the last."""
    kv, heads = config.num_key_value_heads // chips, config.num_attention_heads // chips
    shared = kv * min(MAX_ATTENTION_CORES, worker_cores // kv)
    return [
        Way("plain decoding: a core for each KV head", 1, 1, kv),
        Way("decode kernel: a core for each row and KV head", ROWS, ROWS, min(ROWS * kv, worker_cores)),
        Way("prefill kernel: a core for each query head, all rows", ROWS, heads / kv, heads),
        Way("rows as tiles of one query: a core for each KV head, all rows", ROWS, 1, kv),
        Way("the same, as many cores for a KV head as there are", ROWS, 1, shared),
        Way("plain decoding, as many cores for a KV head", 1, 1, shared),
    ]


def predicted(counts: Counts, family: Family, boards: Sequence[Board] = tuple(BOARDS.values())) -> dict:
    """For each board, context and way: cores, MB of the cache that a chip reads, ms of a forward with its band."""
    config, entries = named_config(SIZE), []
    for board in boards:
        place = places(board, False, board.chips)["target"]
        for context in CONTEXTS:
            for way in ways(config, place.chips, board.worker_cores):
                once = counts.forward(place, SIZE, PRECISION, 1, context).kv_cache
                work = counts.forward(place, SIZE, PRECISION, way.rows, context)
                read = replace(work, kv_cache=way.reads * once)
                figure = family.figure(_ms(family, board, place, config, read, way.cores))
                entries.append(
                    {
                        "board": board.name,
                        "context": context,
                        "way": way.name,
                        "rows": way.rows,
                        "cores": way.cores,
                        "kv_mb": read.kv_cache / 1e6,
                        "ms": figure.value,
                        "ms_band": [figure.low, figure.high],
                    }
                )
    return {"model": SIZE, "precision": PRECISION, "rows": ROWS, "entries": entries}


def _ms(family: Family, board: Board, place: Place, config: LlamaConfig, work: Work, cores: int) -> np.ndarray:
    chip = fit.Chip(board.arch, board.dram_gb_per_s, place.chips, board.dram_banks, board.worker_cores)
    phases = extra_phases(config, fidelities_of(precision_named(PRECISION)), None) / place.chips
    return family.forward_ms(fit.Step(work, chip, config.num_hidden_layers, phases, config.head_dim, cores, YEAR))
