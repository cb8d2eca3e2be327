"""What the parts of a round cost on this machine, measured while it runs."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.speculative.model import SequenceModel

Which = int | str | tuple[str, int]  # a number of rows or tokens, a source of drafts, or both


class CostModel:
    """Seconds that parts of a round take on this machine, shared by the generations of a run.

    Each is the median of its last measurements, so that one moment in which the machine did something else does not
    count. A forward of more rows never takes less: what is known of more rows bounds what is assumed of fewer.

    Args:
        computed_rows: rows that a forward of n rows really computes, where they are padded: forwards that compute the
            same are one cost.
    """

    KEPT = 15  # measurements

    def __init__(self, computed_rows: Callable[[int], int] = lambda n: n) -> None:
        self._computed_rows = computed_rows
        self._times: dict[tuple[str, Which], deque[float]] = {}
        self._medians: dict[str, dict] = {}  # seconds, by what and which
        self._lines: dict[str, tuple[float, float]] = {}  # by source: seconds to begin a draft, and for each step
        self._verify: list[tuple[int, float]] = []  # rows, seconds; made anew after a measurement

    def add(self, what: str, which: Which, seconds: float) -> None:
        """One measurement: ("verify", rows), ("draft", (source, k)) for k steps, ("prefill", source) for one
        token, or ("round", k) where drafting k tokens and verifying them is one device program."""
        if what == "verify" and isinstance(which, int):
            which = self._computed_rows(which)
        if (times := self._times.get((what, which))) is None:
            times = self._times[what, which] = deque(maxlen=self.KEPT)
        times.append(seconds)
        self._medians.setdefault(what, {})[which] = statistics.median(times)
        if what == "verify":
            self._verify = []
        elif what == "draft" and isinstance(which, tuple):
            self._lines.pop(which[0], None)

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

    def known(self, what: str) -> dict:
        """Median seconds by rows or source."""
        return dict(sorted(self._medians.get(what, {}).items()))

    def draft_s(self, source: str, k: float = 1) -> float:
        """Drafting k tokens, or levels of a tree; 0 if nothing is known.

        On the line that fits what was measured by length: beginning a draft costs something by itself, since the
        target has meanwhile driven the draft's weights out of the caches. One length alone: in proportion.
        """
        if source not in self._lines:
            drafts = [each for each in self._medians.get("draft", {}).items() if each[0][0] == source]
            self._lines[source] = _line([(which[1], s, len(self._times["draft", which])) for which, s in drafts])
        begin, step = self._lines[source]
        return begin + k * step if k else 0.0

    def draft_step_s(self, source: str) -> float:
        """One more token, or level, of a draft that has begun; 0 if nothing is known."""
        return self.draft_s(source, 2) - self.draft_s(source, 1)

    def prefill_s(self, source: str) -> float | None:
        """Reading one token of a prompt into the draft."""
        return self._medians.get("prefill", {}).get(source)

    def verify_s(self, rows: int) -> float:
        """A target forward of so many rows: measured, or between the nearest measured; 0 if nothing is known."""
        rows = self._computed_rows(rows)
        if not self._verify:
            bound = math.inf  # by forwards of more rows
            for known, seconds in sorted(self._medians.get("verify", {}).items(), reverse=True):
                bound = min(bound, seconds)
                self._verify.append((known, bound))
        above = None
        for known, seconds in self._verify:  # from many rows to few
            if known <= rows:
                if known == rows or above is None:
                    return seconds
                return seconds + (above[1] - seconds) * (rows - known) / (above[0] - known)
            above = known, seconds
        return above[1] if above else 0.0

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
