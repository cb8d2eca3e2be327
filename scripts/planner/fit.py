"""Time of a step from what it does, fitted to published speeds: a sum of terms with non-negative coefficients.

    ms = (weights + other bytes) / (efficiency x bandwidth)
         + tiles x phases beyond LoFi's x 16 cycles / cores of a matmul            Blackhole; computed, not fitted
         + blocks of 128 cached positions and a KV head x their time / cores of attention
         + layers x what a layer takes besides
         + exchanges x their time
         + the host's time, where it waits for each token + a server's time

Coefficients minimise the sum of squared relative errors of the time. Which terms there are is decided by the errors of
figures that were left out (`FORMS`), all of a model on a board together, since a plan is asked about pairs and boards
that nobody has measured; not by how well the fit itself does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from models.ttnn_llama.shapes import KV_BLOCK
from models.ttnn_llama.weights.precision import bytes_per_value
from scripts.planner.counts import Work

# No chip reads DRAM faster: 92 % is what tt-metal's tech report "Saturating DRAM bandwidth" reached on Wormhole.
MOST_EFFICIENCY = 0.92
# A tile of 32 x 32 weights is multiplied in one phase at LoFi and in as many as this at others, of 16 cycles each.
PHASES = {"LoFi": 1, "HiFi2": 2, "HiFi3": 3, "HiFi4": 4}
PHASE_CYCLES = 16
GHZ = {"wormhole_b0": 1.0, "blackhole": 1.35}  # data sheets


@dataclass(frozen=True)
class Chip:
    """One chip of a board.

    ``gb_per_s`` is published, ``chips`` how many run a model together, ``banks`` of its DRAM, each read by a core that
    multiplies what it has read (DRAM-sharded matmul), ``cores`` are its workers.
    """

    arch: str
    gb_per_s: float
    chips: int
    banks: int
    cores: int

    def ms(self, dram_bytes: float) -> float:
        """Time of moving bytes at the published bandwidth."""
        return dram_bytes / self.gb_per_s / 1e6

    @property
    def cycles_per_ms(self) -> float:
        return GHZ[self.arch] * 1e6


@dataclass(frozen=True)
class Step:
    """What one forward asks of each chip, and under which software.

    Args:
        work: DRAM bytes, programs, exchanges.
        layers: of the model that run.
        extra_phases: weight tiles times phases beyond the first.
        head_dim: of the KV heads.
        attention_cores: that share the reading of the KV cache.
        year: of the software.
        waits: whether the host waits for the token before the next step.
        served: through an inference server.
    """

    work: Work
    chip: Chip
    layers: float
    extra_phases: float
    head_dim: int
    attention_cores: int
    year: int
    waits: bool = True
    served: bool = False

    @property
    def blackhole(self) -> bool:
        return self.chip.arch == "blackhole"

    @property
    def kv_blocks_per_core(self) -> float:
        """Blocks of 128 positions of one KV head, keys and values, for each core of attention, at 1 GHz. A block of a
        bf16 cache counts for as many as it has bytes."""
        block = 2 * KV_BLOCK * self.head_dim * bytes_per_value("bfp8")
        return self.work.kv_cache / block / self.attention_cores / GHZ[self.chip.arch]


@dataclass(frozen=True)
class Observation:
    """A measured step."""

    point: object
    step: Step
    ms: float


# Each term: its unit's factor in ms.
TERMS: dict[str, Callable[[Step], float]] = {
    "wormhole_bytes": lambda s: s.chip.ms(s.work.weights + s.work.other) * (not s.blackhole),
    "blackhole_bytes": lambda s: s.chip.ms(s.work.weights + s.work.other) * s.blackhole,
    # On Wormhole twelve cores multiply at HiFi2 what they read faster than it comes: no time of its own.
    "fidelity": lambda s: s.extra_phases * PHASE_CYCLES / s.chip.banks / s.chip.cycles_per_ms * s.blackhole,
    "kv_block_us": lambda s: s.kv_blocks_per_core / 1000,
    "kv_bytes": lambda s: s.chip.ms(s.work.kv_cache),
    "wormhole_layer_us": lambda s: s.layers / 1000 * (not s.blackhole),
    "wormhole_layer_2025_us": lambda s: s.layers / 1000 * (not s.blackhole and s.year < 2026),
    "wormhole_layer_2026_us": lambda s: s.layers / 1000 * (not s.blackhole and s.year >= 2026),
    "blackhole_layer_us": lambda s: s.layers / 1000 * s.blackhole,
    "blackhole_layer_2025_us": lambda s: s.layers / 1000 * (s.blackhole and s.year < 2026),
    "blackhole_layer_2026_us": lambda s: s.layers / 1000 * (s.blackhole and s.year >= 2026),
    "host_ms": lambda s: 1.0 * s.waits,
    "host_2025_ms": lambda s: 1.0 * (s.waits and s.year < 2026),
    "host_2026_ms": lambda s: 1.0 * (s.waits and s.year >= 2026),
    "server_2025_ms": lambda s: 1.0 * (s.served and s.year < 2026),
    "server_2026_ms": lambda s: 1.0 * (s.served and s.year >= 2026),
    "hop_us": lambda s: s.work.exchanges * (s.chip.chips - 1) / 1000,
    "exchange_us": lambda s: s.work.exchanges / 1000 * (s.chip.chips > 1),
}
_AT_LEAST = {"wormhole_bytes": 1 / MOST_EFFICIENCY, "blackhole_bytes": 1 / MOST_EFFICIENCY}
_KNOWN = {"fidelity": 1.0}  # not fitted

_BYTES = ("wormhole_bytes", "blackhole_bytes")
_LAYERS = ("wormhole_layer_us", "blackhole_layer_2025_us", "blackhole_layer_2026_us")
_REST = ("host_ms", "server_2025_ms", "exchange_us")
FORM = (*_BYTES, "fidelity", "kv_block_us", *_LAYERS, *_REST)
# What else was tried.
FORMS = {
    "one layer for both architectures and generations": (
        *(*_BYTES, "fidelity", "kv_block_us", "wormhole_layer_us", "blackhole_layer_us"),
        *_REST,
    ),
    "no fidelity": (*_BYTES, "kv_block_us", *_LAYERS, *_REST),
    "no exchanges": (*_BYTES, "fidelity", "kv_block_us", *_LAYERS, "host_ms", "server_2025_ms"),
    "no servers": (*_BYTES, "fidelity", "kv_block_us", *_LAYERS, "host_ms", "exchange_us"),
    "KV cache by bytes": (*_BYTES, "fidelity", "kv_bytes", *_LAYERS, *_REST),
    "chosen: exchanges, layers of Blackhole in two generations": FORM,
    "hops instead of exchanges": (*FORM[:-1], "hop_us"),
    "hosts of two generations": (
        *(*_BYTES, "fidelity", "kv_block_us", *_LAYERS, "host_2025_ms", "host_2026_ms"),
        *_REST[1:],
    ),
    "servers of two generations": (*FORM, "server_2026_ms"),
    "layers of Wormhole in two generations too": (
        *(*_BYTES, "fidelity", "kv_block_us", "wormhole_layer_2025_us", "wormhole_layer_2026_us"),
        *(*_LAYERS[1:], *_REST),
    ),
    "KV cache by bytes too": (*FORM, "kv_bytes"),
    "hops too": (*FORM, "hop_us"),
}


def factors(form: Sequence[str], step: Step) -> np.ndarray:
    """[terms]: what each coefficient of a form is multiplied with."""
    return np.array([TERMS[name](step) for name in form])


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
    rows = [factors(form, o.step) for o in observations]
    return np.array(rows), np.array([o.ms for o in observations])


def _solve(matrix: np.ndarray, ms: np.ndarray, form: Sequence[str]) -> np.ndarray:
    known = np.array([name in _KNOWN for name in form])
    coefficients = np.array([_KNOWN.get(name, _AT_LEAST.get(name, 0.0)) for name in form])
    relative = matrix / ms[:, None]
    coefficients[~known] += non_negative(relative[:, ~known], 1 - relative @ coefficients)
    return coefficients


def non_negative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimises |a x - b|. a: [m, n], b: [m]."""
    scale = np.maximum(np.linalg.norm(a, axis=0), 1e-300)  # columns of equal length: one tolerance for all
    return nnls(a / scale, b)[0] / scale
