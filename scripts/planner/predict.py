"""Times of our own forwards and rounds: by the fit, and by other models that explain the published speeds as well.

What the published speeds cannot tell is carried as a family of models. Each gives its own prediction, and the band of a
figure is what they span:
- fits without one (model, board) each: no figure hangs on a single measurement;
- 20, 27 or 30 programs in a layer of tt_transformers: ours has another number, so this decides what a program costs;
- how much of the fixed time of a step is the device's (ending the forward, argmax), which every drafted token pays,
  and how much the host's, which a round pays once: none, half, or all of it.
A time's band is wider by the error of held-out figures (`Family.spread`); in a speed-up only the draft's time is moved
by it against the target's, as the target is in both of its sides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from models.boards import Board
from models.llama.config import named_config
from scripts.planner import fit
from scripts.planner.counts import Counts, Place, Work
from scripts.planner.published import LAYER_PROGRAMS, LAYER_PROGRAMS_RANGE, POINTS, observation

# 1B on T3K: 8.35 ms a step in PERF.md, 6.51 ms in 2026 by a version that hides the host's work (tt-metal issue 49282);
# the difference is about half of the fitted step.
DEVICE_SHARES = (0.5, 0.0, 1.0)
SPREAD_PERCENTILE = 80


@dataclass(frozen=True)
class Figure:
    """A predicted number and its band."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Family:
    """Models of step time, the central one first.

    coefficients: [models, terms] of `fit.FORM`. device_share: [models], part of the fixed time that every forward pays.
    spread: relative error that 80 % of the published figures stay within when their model on their board is held out.
    """

    coefficients: np.ndarray
    device_share: np.ndarray
    spread: float

    @classmethod
    def of(cls, counts: Counts) -> Family:
        """All models; the central one is fitted to all points."""
        fits = []
        for programs in (LAYER_PROGRAMS, *LAYER_PROGRAMS_RANGE):
            observations = [observation(point, counts, programs) for point in POINTS]
            groups = dict.fromkeys(o.point.group for o in observations)
            for left in (None, *groups):
                fits.append(fit.fit([o for o in observations if o.point.group != left]))
            if programs == LAYER_PROGRAMS:
                held_out = np.abs(fit.left_out(observations, key=lambda o: o.point.group))
        return cls(
            coefficients=np.array([each for _ in DEVICE_SHARES for each in fits]),
            device_share=np.repeat(DEVICE_SHARES, len(fits)),
            spread=float(np.percentile(held_out, SPREAD_PERCENTILE)),
        )

    def scaled(self, term: str, factor: float) -> Family:
        """The same with one coefficient of each model multiplied."""
        coefficients = self.coefficients.copy()
        coefficients[:, fit.FORM.index(term)] *= factor
        return replace(self, coefficients=coefficients)

    def term(self, name: str) -> np.ndarray:
        return self.coefficients[:, fit.FORM.index(name)]

    def forward_ms(self, work: Work, chip: fit.Chip, streams: int) -> np.ndarray:
        """[models]: a forward on the device, without the fixed time."""
        factors = fit.factors(fit.FORM, work, chip, streams)
        factors[fit.FORM.index("step_ms")] = 0
        return self.coefficients @ factors

    @property
    def tail_ms(self) -> np.ndarray:
        """[models]: the fixed time that every forward pays."""
        return self.device_share * self.term("step_ms")

    @property
    def host_ms(self) -> np.ndarray:
        """[models]: the fixed time that every exchange with the host pays."""
        return (1 - self.device_share) * self.term("step_ms")

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
        return self.family.host_ms + programs * self.family.term("program_us") / 1000

    def _forward(
        self, place: Place, model: str, precision: str, rows: int, layers: int | None, tree: bool
    ) -> np.ndarray:
        config, context = named_config(model), self.pair.context
        work = self.counts.forward(place, model, precision, rows, context, layers)
        streams = rows * config.num_key_value_heads
        if tree:
            # As `attend.TreeRows`: any number of rows reads the cache once for each query head.
            heads = config.num_attention_heads
            once = self.counts.forward(place, model, precision, 1, context, layers).kv_cache
            work, streams = replace(work, kv_cache=heads // config.num_key_value_heads * once), heads
        chip = fit.Chip(self.board.arch, self.board.dram_gb_per_s, place.chips)
        return self.family.forward_ms(work, chip, streams // place.chips)
