"""Published decode speeds that the planner is fitted to: tt_transformers, one sequence, tokens/s/user.

From models/tt_transformers/PERF.md of tt-metal (commit 040a27c), which calls itself deprecated: the model code and the
host of those figures are older than ttnn 0.81.1. Newer figures exist for single cases and differ by up to a half
(tt-metal issues 46214, 48510 and 48885, pull requests 49292 and 50662), but there is no second table of all boards.
"""

from dataclasses import dataclass

from models.boards import BOARDS
from models.llama.config import named_config
from scripts.planner.counts import Counts, Place, Work
from scripts.planner.fit import Chip, Observation

SOURCE = "tt-metal models/tt_transformers/PERF.md (040a27c), batch 1"
SHORT = 228  # tokens in the cache on average: a prompt of 128, 200 decoded
LONG = 65536 + 100
# Device programs of a layer of tt_transformers beside its exchanges: its source has about 20 calls, and conversions
# between layouts that depend on the version. An assumption; only its product with the time of a program is fitted.
LAYER_PROGRAMS = 27
LAYER_PROGRAMS_RANGE = (20, 30)
LAYER_EXCHANGES = 4  # a reduce-scatter and an all-gather for each of attention and MLP, on several chips

# t/s/u by model, on N150, N300, T3K
_PERFORMANCE = {"1B": (87.8, 105.9, 119.8), "3B": (54.0, 68.0, 68.5), "8B": (28.3, 44.2, 64.3)}
_ACCURACY = {"1B": (84.7, 102.8, 120.5), "3B": (47.6, 63.5, 67.9), "8B": (25.2, 38.8, 60.8)}
_LONG = {"1B": (53.0, 65.2, 73.7), "3B": (25.3, 34.8, 41.0), "8B": (16.9, 26.1, 38.1)}
_BLACKHOLE = {"P100": 29.5, "P150": 33.6}  # 8B, performance

_CHIPS = {name: Chip(board.arch, board.dram_gb_per_s, board.chips) for name, board in BOARDS.items()}
_CHIPS["P100"] = Chip("blackhole", 448.0, 1)  # its data sheet: 28 GB of GDDR6; counts are taken to be those of P150


@dataclass(frozen=True)
class Point:
    """One published figure. ``context``: tokens in the cache, on average."""

    model: str
    board: str
    precision: str
    context: int
    tok_s_user: float
    source: str = SOURCE

    @property
    def group(self) -> tuple[str, str]:
        """Points that share it are nearly the same measurement."""
        return self.model, self.board


POINTS = tuple(
    Point(model, board, precision, context, rate)
    for figures, precision, context in (
        (_PERFORMANCE, "performance", SHORT),
        (_ACCURACY, "accuracy", SHORT),
        (_LONG, "performance", LONG),
    )
    for model, rates in figures.items()
    for board, rate in zip(("N150", "N300", "T3K"), rates, strict=True)
) + tuple(Point("8B", board, "performance", SHORT, rate) for board, rate in _BLACKHOLE.items())


def observation(point: Point, counts: Counts, layer_programs: int = LAYER_PROGRAMS) -> Observation:
    """A figure with the work it stands for: our bytes, and tt_transformers' programs."""
    chip = _CHIPS[point.board]
    place = Place("P150" if point.board == "P100" else point.board, chip.chips)
    layers = counts.layers(place, point.model, point.precision)
    work = _their_forward(counts, place, point, point.precision, layers, layer_programs, chip.chips)
    if (point.model, point.precision) == ("8B", "performance"):
        # PERF.md: the last layer keeps bfp8 gate and up matrices.
        work = _their_forward(counts, place, point, "performance", layers - 1, layer_programs, chip.chips)
        layer, _ = counts.parts(place, point.model, "accuracy", 1, point.context)
        work += _their_layer(layer, layer_programs, chip.chips)
    heads = named_config(point.model).num_key_value_heads // chip.chips
    return Observation(point, work, chip, streams=heads, ms=1000 / point.tok_s_user)


def _their_forward(
    counts: Counts, place: Place, point: Point, precision: str, layers: int, programs: int, chips: int
) -> Work:
    layer, outside = counts.parts(place, point.model, precision, 1, point.context)
    return layers * _their_layer(layer, programs, chips) + outside


def _their_layer(layer: Work, programs: int, chips: int) -> Work:
    exchanges = LAYER_EXCHANGES if chips > 1 else 0
    return Work(programs + exchanges, exchanges, layer.weights, layer.kv_cache, layer.other)
