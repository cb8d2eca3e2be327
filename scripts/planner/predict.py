"""Times of our own forwards and rounds: by the fit, and by other models that explain the published speeds as well.

What the published speeds cannot tell is carried as a family of models. Each gives its own prediction, and the band of a
figure is what they span:
- fits without one (model, board) each: no figure hangs on a single measurement;
- what a layer takes besides its bytes (`VARIANTS`): as in the software of 2026; on Blackhole as in 2025; on Wormhole in
  proportion to its programs, of which ours has 16 and tt_transformers about 27. On Blackhole fewer programs are worth
  nothing: there a whole decode as one program was 1.2 % faster than as 999 (P300x2);
- how much of the time that a host waits is the device's after all (ending the forward, argmax), which every drafted
  token pays: none, as figures without a waiting host say, or half.
A time's band is wider by the error of held-out figures (`Family.spread`); in a speed-up only the draft's time is moved
by it against the target's, as the target is in both of its sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from models.boards import Board
from models.llama.config import named_config
from models.ttnn_llama.weights.precision import precision_named
from scripts.planner import fit
from scripts.planner.counts import Counts, Place
from scripts.planner.published import (
    LAYER_PROGRAMS,
    POINTS,
    extra_phases,
    fidelities_of,
    observation,
)

DEVICE_SHARES = (0.0, 0.5)
OUR_LAYER_PROGRAMS = 16
YEAR = 2026  # of the software that ours is like: ttnn 0.81.1
SPREAD_PERCENTILE = 80
LAYER_TERMS = ("wormhole_layer_us", "blackhole_layer_2026_us")


def _slow_blackhole(coefficients: np.ndarray) -> np.ndarray:
    changed = coefficients.copy()
    changed[fit.FORM.index("blackhole_layer_2026_us")] = changed[fit.FORM.index("blackhole_layer_2025_us")]
    return changed


def _few_programs(coefficients: np.ndarray) -> np.ndarray:
    changed = coefficients.copy()
    changed[fit.FORM.index("wormhole_layer_us")] *= OUR_LAYER_PROGRAMS / LAYER_PROGRAMS
    return changed


VARIANTS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (lambda same: same, _slow_blackhole, _few_programs)


@dataclass(frozen=True)
class Figure:
    """A predicted number and its band."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Family:
    """Models of step time, the central one first.

    coefficients: [models, terms] of `fit.FORM`. device_share: [models], part of host time paid by every forward.
    spread: relative error that 80 % of the published figures stay within when their model on their board is held out.
    """

    coefficients: np.ndarray
    device_share: np.ndarray
    spread: float

    @classmethod
    def of(cls, counts: Counts) -> Family:
        """All models; the central one is fitted to all points."""
        observations = [observation(point, counts) for point in POINTS]
        groups = dict.fromkeys(o.point.group for o in observations)
        fits = [fit.fit([o for o in observations if o.point.group != left]) for left in (None, *groups)]
        models = [variant(each) for variant in VARIANTS for each in fits]
        held_out = np.abs(fit.left_out(observations, key=lambda o: o.point.group))
        return cls(
            coefficients=np.array([each for _ in DEVICE_SHARES for each in models]),
            device_share=np.repeat(DEVICE_SHARES, len(models)),
            spread=float(np.percentile(held_out, SPREAD_PERCENTILE)),
        )

    def faster_layers(self, us: float) -> Family:
        """The same with so much less for each layer, down to nothing."""
        coefficients = self.coefficients.copy()
        for name in LAYER_TERMS:
            column = fit.FORM.index(name)
            coefficients[:, column] = np.maximum(coefficients[:, column] - us, 0)
        return replace(self, coefficients=coefficients)

    def term(self, name: str) -> np.ndarray:
        return self.coefficients[:, fit.FORM.index(name)]

    def forward_ms(self, step: fit.Step) -> np.ndarray:
        """[models]: a forward on the device, without the host."""
        return self.coefficients @ fit.factors(fit.FORM, replace(step, waits=False, served=False))

    def program_ms(self, arch: str) -> np.ndarray:
        """[models]: a program beside the layers', by those of a layer of tt_transformers."""
        name = "blackhole_layer_2026_us" if arch == "blackhole" else "wormhole_layer_us"
        return self.term(name) / LAYER_PROGRAMS / 1000

    @property
    def tail_ms(self) -> np.ndarray:
        """[models]: of the host's time, what is the device's and paid by every forward."""
        return self.device_share * self.term("host_ms")

    @property
    def host_ms(self) -> np.ndarray:
        """[models]: of the host's time, what every exchange with the host pays."""
        return (1 - self.device_share) * self.term("host_ms")

    def figure(self, values: np.ndarray) -> Figure:
        """Of a time or a rate."""
        return Figure(
            float(values[0]), float(values.min() * (1 - self.spread)), float(values.max() * (1 + self.spread))
        )


@dataclass(frozen=True)
class Pair:
    """A target and a draft, where they run, and how many tokens are in their caches.

    ``own_chip``: the draft has a chip of its own, so that a round is two programs. ``draft_layers``: of the draft, that
    it has been cut to (early exit), or None for all.
    """

    target: str
    draft: str
    precision: str
    draft_precision: str
    places: dict[str, Place]
    context: int
    own_chip: bool = False
    draft_layers: int | None = None
    attention_cores: int = 1
    projections: str | None = None


class Times:
    """Milliseconds of a pair's steps by every model of a family, each [models]."""

    def __init__(self, family: Family, counts: Counts, board: Board, pair: Pair):
        self.family, self.counts, self.board, self.pair = family, counts, board, pair

    def target(self, rows: int, *, tree: bool = False) -> np.ndarray:
        """A forward of the target on the device; of a tree's rows, if they are."""
        return self._forward(self.pair.places["target"], self.pair.target, self.pair.precision, rows, None, tree)

    def draft(self, rows: int, *, tree: bool = False) -> np.ndarray:
        """A forward of the draft on the device."""
        pair = self.pair
        return self._forward(pair.places["draft"], pair.draft, pair.draft_precision, rows, pair.draft_layers, tree)

    def decode(self) -> np.ndarray:
        """A step of plain decoding by the target: what a speed-up is over."""
        return self.target(1) + self.family.tail_ms + self.family.host_ms

    def drafting(self, k: int) -> np.ndarray:
        """k chained steps of the draft; the first reads two tokens."""
        if not k:
            return 0 * self.family.tail_ms
        return self.draft(2) + (k - 1) * self.draft(1) + k * self.family.tail_ms

    def verifying(self, rows: int) -> np.ndarray:
        return self.target(rows) + self.family.tail_ms

    def between(self, k: int) -> np.ndarray:
        """The rest of a round: the host, twice for two programs, and the fused round's own device programs."""
        if self.pair.own_chip and k:
            return 2 * self.family.host_ms
        programs = self.counts.round_programs(self.pair.places["target"], k) if k else 0
        return self.family.host_ms + programs * self.family.program_ms(self.board.arch)

    def _forward(
        self, place: Place, model: str, precision: str, rows: int, layers: int | None, tree: bool
    ) -> np.ndarray:
        config, pair = named_config(model), self.pair
        work = self.counts.forward(place, model, precision, rows, pair.context, layers)
        cores = rows * config.num_key_value_heads // place.chips * pair.attention_cores
        if tree:
            # As `attend.TreeRows`: any number of rows reads the cache once for each query head, on a core each.
            heads = config.num_attention_heads
            once = self.counts.forward(place, model, precision, 1, pair.context, layers).kv_cache
            work, cores = replace(work, kv_cache=heads // config.num_key_value_heads * once), heads // place.chips
        fidelities = fidelities_of(precision_named(precision))
        if pair.projections:
            fidelities |= dict.fromkeys(("attention", "gate_up", "down"), pair.projections)
        board = self.board
        chip = fit.Chip(board.arch, board.dram_gb_per_s, place.chips, board.dram_banks, board.worker_cores)
        return self.family.forward_ms(
            fit.Step(
                work,
                chip,
                config.num_hidden_layers if layers is None else layers,
                extra_phases(config, fidelities, layers) / place.chips,
                config.head_dim,
                max(1, min(cores, chip.cores)),
                YEAR,
            )
        )
