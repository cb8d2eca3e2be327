"""Time of a forward from what it does, fitted to published speeds: a sum of terms with non-negative coefficients.

    ms = (weights + other bytes) / (efficiency x bandwidth) + KV bytes / (rate of attention)
         + programs x time of a program + exchanges x (chips - 1) x time of a hop + a fixed time per step

Coefficients minimise the sum of squared relative errors of the time. How many terms there may be is decided by
leave-one-out errors (`FORMS`), not by how well the fit itself does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from scripts.planner.counts import Work

# No chip reads DRAM faster: 92 % is what tt-metal's tech report "Saturating DRAM bandwidth" reached on Wormhole.
MOST_EFFICIENCY = 0.92
# Attention of one row on N150: pairs of a row and a KV head that run beside each other on a chip. More than these are
# not taken to run any faster.
MOST_STREAMS = 8


@dataclass(frozen=True)
class Chip:
    """One chip of a board: ``gb_per_s`` is published, ``chips`` how many run a model together."""

    arch: str
    gb_per_s: float
    chips: int

    def ms(self, dram_bytes: float) -> float:
        """Time of moving bytes at the published bandwidth."""
        return dram_bytes / self.gb_per_s / 1e6


@dataclass(frozen=True)
class Observation:
    """A measured step. ``streams``: rows x KV heads on each chip."""

    point: object
    work: Work
    chip: Chip
    streams: int
    ms: float


# Each term: its unit's factor in ms, from (work, chip, streams).
TERMS: dict[str, Callable[[Work, Chip, int], float]] = {
    "wormhole_bytes": lambda w, c, s: c.ms(w.weights + w.other) * (c.arch == "wormhole_b0"),
    "blackhole_bytes": lambda w, c, s: c.ms(w.weights + w.other) * (c.arch == "blackhole"),
    "kv_bytes": lambda w, c, s: c.ms(w.kv_cache),
    "kv_bytes_per_stream": lambda w, c, s: c.ms(w.kv_cache) * MOST_STREAMS / min(s, MOST_STREAMS),
    "program_us": lambda w, c, s: w.programs / 1000,
    "step_ms": lambda w, c, s: 1.0,
    "hop_us": lambda w, c, s: w.exchanges * (c.chips - 1) / 1000,
    "exchange_us": lambda w, c, s: w.exchanges / 1000,
}
_AT_LEAST = {"wormhole_bytes": 1 / MOST_EFFICIENCY, "blackhole_bytes": 1 / MOST_EFFICIENCY}

_BYTES = ("wormhole_bytes", "blackhole_bytes")
FORM = (*_BYTES, "kv_bytes", "kv_bytes_per_stream", "program_us", "step_ms", "hop_us")
# What else was tried. Without FORM's last term small models on T3K come out too fast, and so on.
FORMS = {
    "bytes at one rate, programs": (*_BYTES, "kv_bytes", "program_us"),
    "+ step": (*_BYTES, "kv_bytes", "program_us", "step_ms"),
    "+ step, hops": (*_BYTES, "kv_bytes", "program_us", "step_ms", "hop_us"),
    "+ step, exchanges": (*_BYTES, "kv_bytes", "program_us", "step_ms", "exchange_us"),
    "streams, hops, no programs": (*_BYTES, "kv_bytes", "kv_bytes_per_stream", "step_ms", "hop_us"),
    "streams, hops, no step": (*_BYTES, "kv_bytes", "kv_bytes_per_stream", "program_us", "hop_us"),
    "chosen: streams, programs, step, hops": FORM,
    "streams, programs, step, exchanges": (*FORM[:-1], "exchange_us"),
    "all of these": (*FORM, "exchange_us"),
}


def factors(form: Sequence[str], work: Work, chip: Chip, streams: int) -> np.ndarray:
    """[terms]: what each coefficient of a form is multiplied with."""
    return np.array([TERMS[name](work, chip, streams) for name in form])


def fit(observations: Sequence[Observation], form: Sequence[str] = FORM) -> np.ndarray:
    """Coefficients [terms]. A term that no observation has stays at its smallest."""
    return _solve(*_system(observations, form), form)


def errors(observations: Sequence[Observation], form: Sequence[str] = FORM) -> np.ndarray:
    """Predicted / published tokens per second - 1 of each observation, by the fit to all."""
    matrix, ms = _system(observations, form)
    return ms / (matrix @ _solve(matrix, ms, form)) - 1


def left_out(
    observations: Sequence[Observation], form: Sequence[str] = FORM, key: Callable[[Observation], Hashable] = id
) -> np.ndarray:
    """Predicted / published - 1 of each observation, by the fit to those with another ``key``: by default, all but
    itself."""
    matrix, ms = _system(observations, form)
    keys = [key(observation) for observation in observations]
    predicted = np.empty(len(ms))
    for left in set(keys):
        out = np.array([other == left for other in keys])
        predicted[out] = matrix[out] @ _solve(matrix[~out], ms[~out], form)
    return ms / predicted - 1


def _system(observations: Sequence[Observation], form: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    rows = [factors(form, o.work, o.chip, o.streams) for o in observations]
    return np.array(rows), np.array([o.ms for o in observations])


def _solve(matrix: np.ndarray, ms: np.ndarray, form: Sequence[str]) -> np.ndarray:
    least = np.array([_AT_LEAST.get(name, 0.0) for name in form])
    relative = matrix / ms[:, None]
    return least + non_negative(relative, 1 - relative @ least)


def non_negative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimises |a x - b|. a: [m, n], b: [m]."""
    scale = np.maximum(np.linalg.norm(a, axis=0), 1e-300)  # columns of equal length: one tolerance for all
    return nnls(a / scale, b)[0] / scale
