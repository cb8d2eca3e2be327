"""What the parts of a round cost on this machine, measured while it runs."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from models.speculative.model import IDS, LOGITS, Rows

if TYPE_CHECKING:
    from models.speculative.model import LanguageModel, SequenceModel

Which = int | str | tuple[str, int] | tuple[str, int, int]  # rows or tokens, a source of drafts, or both


class CostModel:
    """Seconds that parts of a round take on this machine, shared by the generations of a run.

    Each is the median of its last measurements, so that one moment in which the machine did something else does not
    count. A forward of more rows never takes less: what is known of more rows bounds what is assumed of fewer.

    Args:
        computed_rows: rows that a forward of n rows really computes, where they are padded: forwards that compute the
            same are one cost.
    """

    KEPT = 15  # measurements
    DEAR_S = 0.5  # a forward that is not measured for the sake of knowing
    CONTEXT = 1024  # tokens: forwards that read fewer are one cost; from there on those of each doubling are another

    def __init__(self, computed_rows: Callable[[int], int] = lambda n: n) -> None:
        self._computed_rows = computed_rows
        self._times: dict[tuple[str, Which], deque[float]] = {}
        self._medians: dict[str, dict] = {}  # seconds, by what and which
        self._lines: dict[tuple[str, int], tuple[float, float]] = {}  # by source and sequences: see `draft_s`
        self._forwards: dict[int, dict[int, float]] = {}  # seconds by context, then rows
        self._curves: dict[int, list[tuple[int, float]]] = {}  # by context: rows, seconds; made anew when it changes
        self._context = 0  # measured last
        self._stale: set[tuple[str, Which]] = set()  # what the next measurement replaces

    def add(self, what: str, which: Which, seconds: float, context: int = 0) -> None:
        """One measurement: ("verify", rows of all sequences in the forward) at so many tokens of context, of all their
        texts; ("draft", (source, k)) for k steps, or ("draft", (source, k, n)) for k steps that n sequences shared;
        ("prefill", source) for one token; or ("round", k) where drafting k tokens and verifying them is one device
        program."""
        if what == "verify" and isinstance(which, int):
            which, self._context = self._computed_rows(which), self._level(context)
        kind = f"{what} {self._context}" if what == "verify" else what
        if (times := self._times.get((kind, which))) is None:
            times = self._times[kind, which] = deque(maxlen=self.KEPT)
        if self._stale and (kind, which) in self._stale:
            self._stale.discard((kind, which))
            times.clear()
        times.append(seconds)
        median = statistics.median(times)
        if what == "verify" and isinstance(which, int):
            self._forwards.setdefault(self._context, {})[which] = median
            self._curves.clear()
            return
        self._medians.setdefault(what, {})[which] = median
        if what == "draft":
            self._lines.clear()

    def doubt(self, rows: int, context: int = 0) -> None:
        """What is known of a forward of so many rows is old: the next measurement replaces it."""
        self._stale.add((f"verify {self._level(context)}", self._computed_rows(rows)))

    def measure(self, target: SequenceModel, rows: Iterable[int], *, greedy: bool = True, repeats: int = 5) -> None:
        """Time forwards of the target by number of rows, in turn, so that a busy moment hits all of them alike.

        Leaves nonsense in its cache: to be called between texts.
        """
        rows = sorted(set(rows))
        for repeat in range(repeats + 1):  # the first one may prepare kernels
            for n in rows:
                began = time.perf_counter()
                if greedy:
                    target.greedy([0] * n, 0)
                else:
                    target.forward([0] * n, 0)[-1, -1].item()  # waits for the device
                if repeat:
                    self.add("verify", n, time.perf_counter() - began)

    def measure_together(self, target: LanguageModel, *, greedy: bool = True, repeats: int = 2) -> None:
        """Time forwards that all slots share, of some rows each. A forward that takes long is the last one tried.

        Leaves nonsense in the caches: to be called between texts.
        """
        limits = target.limits
        want = IDS if greedy else LOGITS
        for n in (1, 2, 4, 7):
            if n > min(limits.rows, limits.positions, (limits.batch_rows or n * limits.slots) // limits.slots):
                break
            rows = [Rows(slot, [0] * n, 0) for slot in range(limits.slots)]
            spent = 0.0
            for repeat in range(repeats + 1):
                began = time.perf_counter()
                step = target.extend(rows, want)
                step.ids() if greedy else step.logits(0)[-1, -1].item()
                spent = time.perf_counter() - began
                if repeat or spent > self.DEAR_S:
                    self.add("verify", n * limits.slots, spent)
                if spent > self.DEAR_S:
                    break
            if spent > self.DEAR_S:
                break
        for slot in range(limits.slots):
            target.free(slot)

    def known(self, what: str) -> dict:
        """Median seconds by rows or source; of "verify" at the context measured last, as far as it is known there."""
        if what == "verify":
            others = sorted(self._forwards, key=lambda level: -abs(level - self._context))
            return dict(sorted({n: s for level in others for n, s in self._forwards[level].items()}.items()))
        return dict(sorted(self._medians.get(what, {}).items()))

    def draft_s(self, source: str, k: float = 1, together: int = 1) -> float:
        """Drafting k tokens, or levels of a tree, for one sequence, or for several together; 0 if nothing is known.

        On the line that fits what was measured by length: beginning a draft costs something by itself, since the
        target has meanwhile driven the draft's weights out of the caches. One length alone: in proportion. What was
        not measured for so many sequences is taken to cost as for the nearest number.
        """
        if (source, together) not in self._lines:
            points: dict[int, list[tuple[int, float, int]]] = {}
            for which, seconds in self._medians.get("draft", {}).items():
                if which[0] == source:
                    point = (which[1], seconds, len(self._times["draft", which]))
                    points.setdefault(which[2] if len(which) > 2 else 1, []).append(point)
            nearest = min(points, key=lambda n: abs(math.log(n / together)), default=0)
            self._lines[source, together] = _line(points.get(nearest, []))
        begin, step = self._lines[source, together]
        return begin + k * step if k else 0.0

    def draft_step_s(self, source: str, together: int = 1) -> float:
        """One more token, or level, of a draft that has begun; 0 if nothing is known."""
        return self.draft_s(source, 2, together) - self.draft_s(source, 1, together)

    def prefill_s(self, source: str) -> float | None:
        """Reading one token of a prompt into the draft."""
        return self._medians.get("prefill", {}).get(source)

    def verify_s(self, rows: int, context: int = 0) -> float:
        """A target forward of so many rows: measured, or between the nearest measured; 0 if nothing is known."""
        rows, level = self._computed_rows(rows), self._level(context)
        if (curve := self._curves.get(level)) is None:
            curve = self._curves[level] = self._curve(level)
        above = None
        for known, seconds in curve:  # from many rows to few
            if known <= rows:
                if known == rows or above is None:
                    return seconds
                return seconds + (above[1] - seconds) * (rows - known) / (above[0] - known)
            above = known, seconds
        return above[1] if above else 0.0

    def _level(self, context: int) -> int:
        """Doublings above CONTEXT."""
        return (context // self.CONTEXT).bit_length() if context >= self.CONTEXT else 0

    def _curve(self, level: int) -> list[tuple[int, float]]:
        """(rows, seconds) from many rows to few at a context. What was measured at others only is scaled by what was
        measured at both, nearest first."""
        here = dict(self._forwards.get(level, {}))
        for other in sorted(self._forwards, key=lambda each: abs(each - level)):
            there = self._forwards[other]
            both = [here[n] / there[n] for n in there if n in here and there[n]]
            scale = statistics.median(both) if both else 1.0
            here = {n: scale * s for n, s in there.items()} | here
        curve, bound = [], math.inf  # by forwards of more rows
        for rows, seconds in sorted(here.items(), reverse=True):
            bound = min(bound, seconds)
            curve.append((rows, bound))
        return curve

    def whole_round_s(self, k: int) -> float | None:
        """A round of k drafted tokens as one program: measured, or on the line through those next to it, a plain step
        being the round of none; None where no such round was measured."""
        if "round" not in self._medians:
            return None
        known = {0: self.verify_s(1), **self.known("round")}
        if k in known:
            return known[k]
        above = min((length for length in known if length > k), default=max(known))
        below = max(length for length in known if length < above)
        return known[below] + (known[above] - known[below]) * (k - below) / (above - below)


def _line(points: list[tuple[int, float, int]]) -> tuple[float, float]:
    """(value at 0, slope), neither negative, of the line nearest to points (x, y, weight) in the squared distance."""
    weight = sum(w for *_, w in points)
    if not weight:
        return 0.0, 0.0
    x = sum(w * x for x, _, w in points) / weight
    y = sum(w * y for _, y, w in points) / weight
    spread = sum(w * (px - x) ** 2 for px, _, w in points)
    slope = sum(w * (px - x) * (py - y) for px, py, w in points) / spread if spread else y / x
    slope = min(max(slope, 0.0), y / x)
    return y - slope * x, slope
