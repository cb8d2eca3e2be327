"""Device programs and DRAM bytes of a forward, for any number of rows and any context, from captured ones.

Captured at 1, 2, 4, 8, 16 and 32 rows and two contexts (capture.py). Between row counts bytes are linear and programs
are those of the next captured count, since a forward is padded to one it was built for. Bytes of the KV cache are
linear in the context (attention reads whole chunks of 128 positions, on average half a chunk too many), weights do not
depend on it.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from pathlib import Path

from models.boards import Board
from models.errors import UserError
from models.llama.config import read_json
from models.ttnn_llama.shapes import KV_BLOCK
from models.ttnn_llama.weights.precision import PRECISIONS, Precision

SIZES = ("1B", "3B", "8B")
ROWS = (1, 2, 4, 8, 16, 32)
POSITIONS = (1024, 8192)
SHIPPED = Path(__file__).resolve().parent.parent.parent / "docs" / "results" / "plan-counts.json"


@dataclass(frozen=True)
class Work:
    """What each chip does. Works add and multiply; bytes are DRAM bytes read and written, fractions where interpolated.

    ``programs``: device programs, exchanges among them. ``exchanges``: those in which chips wait for each other, an
    all-gather or a reduce-scatter; an all-reduce has one of each.
    """

    programs: float = 0
    exchanges: float = 0
    weights: float = 0
    kv_cache: float = 0
    other: float = 0

    @property
    def dram(self) -> float:
        return self.weights + self.kv_cache + self.other

    def __add__(self, work: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(work), strict=True)))

    def __rmul__(self, times: float) -> Work:
        return Work(*(times * value for value in astuple(self)))


@dataclass(frozen=True)
class Place:
    """Chips that one model runs on, as many as there are of a board."""

    board: str
    chips: int


class Counts:
    """Captured counts: ``data`` is what `capture.capture` returns, ``source`` says where it is from."""

    def __init__(self, data: dict, source: str):
        self.source = source
        self._layers: dict[tuple, int] = {}
        self._parts: dict[tuple, dict[tuple[int, int], tuple[Work, Work]]] = {}
        for entry in data["forwards"]:
            key = entry["board"], entry["chips"], entry["model"], entry["precision"]
            self._layers[key] = entry["layers"]
            parts = Work(*entry["layer"]), Work(*entry["outside"])
            self._parts.setdefault(key, {})[entry["rows"], entry["position"]] = parts
        self._rounds: dict[tuple, dict[int, int]] = {}
        for entry in data["rounds"]:
            lengths = self._rounds.setdefault((entry["board"], entry["chips"]), {})
            lengths[entry["draft_length"]] = entry["programs"]

    @classmethod
    def shipped(cls) -> Counts:
        """Those in docs/results. Raises UserError if the file is missing or broken."""
        data = read_json(SHIPPED)
        return cls(data, f"shipped, captured with ttnn {data['ttnn']}")

    def layers(self, place: Place, model: str, precision: str) -> int:
        return self._layers[self._key(place, model, precision)]

    def forward(
        self, place: Place, model: str, precision: str, rows: int, context: float, layers: int | None = None
    ) -> Work:
        """A greedy forward of 1 to 32 rows that follow ``context`` tokens, by all layers or the first ``layers``."""
        layer, outside = self.parts(place, model, precision, rows, context)
        return (self.layers(place, model, precision) if layers is None else layers) * layer + outside

    def parts(self, place: Place, model: str, precision: str, rows: int, context: float) -> tuple[Work, Work]:
        """(each layer, all the rest) of such a forward."""
        captured = self._parts[self._key(place, model, precision)]
        positions = sorted({position for _, position in captured})
        first, second = positions[0], positions[-1]
        near, far = (self._at_rows(captured, rows, position) for position in (first, second))
        # The captured positions begin a chunk, so that they read all of it; on average half a chunk is read in vain.
        read = [position + KV_BLOCK for position in (first, second)]
        share = (context + (1 + KV_BLOCK) / 2 - read[0]) / (read[1] - read[0])
        return tuple(
            Work(a.programs, a.exchanges, a.weights, a.kv_cache + share * (b.kv_cache - a.kv_cache), a.other)
            for a, b in zip(near, far, strict=True)
        )

    def round_programs(self, place: Place, k: int) -> float:
        """Programs of a fused round of k drafted tokens beside those of its forwards, linear between captured k."""
        captured = sorted(self._rounds[place.board, place.chips].items())
        below = max((item for item in captured if item[0] <= k), default=captured[0])
        above = min((item for item in captured if item[0] >= k), default=captured[-1])
        if below[0] == above[0]:
            return below[1]
        return below[1] + (k - below[0]) / (above[0] - below[0]) * (above[1] - below[1])

    def _key(self, place: Place, model: str, precision: str) -> tuple:
        # Bytes and programs depend on formats alone: a precision of another fidelity has those of its like.
        names = [precision]
        if precision in PRECISIONS:
            formats = _formats(PRECISIONS[precision])
            names += [name for name, other in PRECISIONS.items() if _formats(other) == formats]
        keys = [(place.board, place.chips, model, name) for name in names]
        key = next((key for key in keys if key in self._parts), None)
        if key is None:
            raise UserError(
                f"no counts of {model} {precision} on {place.chips} of {place.board}'s chips ({self.source}): "
                "capture them with scripts/plan.py --capture"
            )
        return key

    @staticmethod
    def _at_rows(captured: dict, rows: int, position: int) -> tuple[Work, Work]:
        counts = sorted({n for n, at in captured if at == position})
        above = min(n for n in counts if n >= rows)
        below = max(n for n in counts if n <= rows)
        if above == below:
            return captured[above, position]
        share = (rows - below) / (above - below)
        mixed = []
        for a, b in zip(captured[below, position], captured[above, position], strict=True):
            between = (1 - share) * a + share * b
            mixed.append(Work(b.programs, b.exchanges, between.weights, between.kv_cache, between.other))
        return tuple(mixed)


def _formats(precision: Precision) -> tuple[str, ...]:
    return precision.attention, precision.gate_up, precision.down, precision.head, precision.kv_cache


def places(board: Board, own_chip: bool, target_chips: int) -> dict[str, Place]:
    """Where "target" and "draft" run: all chips, or ``target_chips`` and one."""
    if not own_chip:
        return dict.fromkeys(("target", "draft"), Place(board.name, board.chips))
    return {"target": Place(board.name, target_chips), "draft": Place(board.name, 1)}


def write(data: dict, file: Path) -> None:
    """Counts as JSON, an entry a line."""
    kinds = []
    for kind in ("forwards", "rounds"):
        lines = ",\n".join("    " + json.dumps(entry) for entry in data[kind])
        kinds.append(f'  "{kind}": [\n{lines}\n  ]')
    file.write_text(f'{{\n  "ttnn": {json.dumps(data["ttnn"])},\n' + ",\n".join(kinds) + "\n}\n", encoding="utf-8")
