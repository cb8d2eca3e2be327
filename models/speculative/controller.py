"""How many tokens to draft now: a fixed number, or what measured costs and acceptance say pays best.

Tokens per second with K drafted tokens, for the costs of this machine and the acceptance of this text:

    rate(K) = (1 + a1 + a1 a2 + ... + a1..aK) / (draft(K) + verify(K + 1))

a_i is the chance that token i is accepted once those before it are. K = 0 is plain decoding.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from models.errors import UserError
from models.speculative.stats import Round

if TYPE_CHECKING:
    from models.speculative.language_model import LanguageModel

MAX_DRAFT_LENGTH = 31  # with the token before them, drafted tokens fill one tile of 32 rows


class Controller(Protocol):
    """Asked before every round, told about every round. It may learn from rounds and times, never from tokens ahead."""

    def begin(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """A generation starts: how many tokens its prompt has, and how many will be emitted at most."""

    def draft_length(self, source: str) -> int:
        """Tokens that this source of drafts may propose now; 0: none, decode one token plainly."""

    def pays(self, source: str, reach: float, steps: int, rows: int) -> bool:
        """Whether a further token of a draft is worth its time: see `drafters.Limit`."""

    def read_prompt(self, seconds: float) -> None:
        """The draft has read the prompt, in that time."""

    def update(self, round: Round) -> None:
        """A round has been decided; its tokens are about to be emitted, so that host_s is not known yet."""


class FixedDraftLength:
    """The same number in every round, 0 (never draft) to 31."""

    def __init__(self, k: int = 4) -> None:
        if not 0 <= k <= MAX_DRAFT_LENGTH:
            raise UserError(f"draft length {k}: must be between 0 (no speculation) and {MAX_DRAFT_LENGTH}")
        self.k = k

    def begin(self, prompt_tokens: int, max_new_tokens: int) -> None:
        pass

    def draft_length(self, source: str) -> int:
        return self.k

    def pays(self, source: str, reach: float, steps: int, rows: int) -> bool:
        return True

    def read_prompt(self, seconds: float) -> None:
        pass

    def update(self, round: Round) -> None:
        pass


class Costs:
    """Seconds that parts of a round take on this machine, shared by the generations of a run.

    Each is the median of its last measurements, so that one moment in which the machine did something else does not
    count. A forward of more rows never takes less: what is known of more rows bounds what is assumed of fewer.
    """

    KEPT = 15  # measurements

    def __init__(self) -> None:
        self._times: dict[tuple[str, object], deque[float]] = {}
        self._medians: dict[tuple[str, object], float] = {}
        self._verify: list[tuple[int, float]] = []  # rows, seconds; made anew after a measurement

    def add(self, what: str, which: object, seconds: float) -> None:
        """One measurement: ("verify", rows), ("draft", source) for one token, or ("prefill", source) for one token."""
        times = self._times.setdefault((what, which), deque(maxlen=self.KEPT))
        times.append(seconds)
        self._medians[what, which] = statistics.median(times)
        if what == "verify":
            self._verify = []

    def add_round(self, round: Round) -> None:
        """Learn from the times of a round."""
        self.add("verify", round.drafted + 1, round.verify_s)
        if round.drafted:
            self.add("draft", round.source, round.draft_s / round.drafted)

    def measure(self, target: LanguageModel, rows: Iterable[int], *, greedy: bool = True, repeats: int = 5) -> None:
        """Time forwards of the target by number of rows. Leaves nonsense in its cache: to be called between texts."""
        for n in sorted(set(rows)):
            for repeat in range(repeats + 1):  # the first one may prepare kernels
                began = time.perf_counter()
                result = (target.greedy if greedy else target.forward)([0] * n, 0)
                if not greedy:
                    result[-1, -1].item()  # waits for the device
                if repeat:
                    self.add("verify", n, time.perf_counter() - began)

    def known(self, what: str) -> dict:
        """Median seconds by rows or source."""
        return {which: seconds for (kind, which), seconds in sorted(self._medians.items()) if kind == what}

    def draft_s(self, source: str) -> float:
        """Drafting one token; 0 if nothing is known."""
        return self._medians.get(("draft", source), 0.0)

    def prefill_s(self, source: str) -> float | None:
        """Reading one token of a prompt into the draft."""
        return self._medians.get(("prefill", source))

    def verify_s(self, rows: int) -> float:
        """A target forward of so many rows: measured, or between the nearest measured; 0 if nothing is known."""
        if not self._verify:
            bound = math.inf  # by forwards of more rows
            for known in sorted((which for what, which in self._medians if what == "verify"), reverse=True):
                bound = min(bound, self._medians["verify", known])
                self._verify.append((known, bound))
        above = None
        for known, seconds in self._verify:  # from many rows to few
            if known <= rows:
                if known == rows or above is None:
                    return seconds
                return seconds + (above[1] - seconds) * (rows - known) / (above[0] - known)
            above = known, seconds
        return above[1] if above else 0.0

    def round_s(self, source: str, k: int) -> float:
        """A round that drafts k tokens from this source."""
        return k * self.draft_s(source) + self.verify_s(k + 1)


class Acceptance:
    """How likely token i of a draft is accepted once those before it are, for one source in one generation.

    Counts fade by DECAY with every round that drafted. Before there are any, and for tokens beyond those tried, the
    chance of the token before is taken, for the first one `prior`.
    """

    DECAY = 0.95
    PRIOR_WEIGHT = 2.0  # the prior counts as much as so many rounds

    def __init__(self, prior: float) -> None:
        self.prior = prior
        self._tried: list[float] = []
        self._kept: list[float] = []

    def add(self, drafted: int, accepted: int) -> None:
        """A round kept `accepted` of `drafted` tokens: that many held, and one more was tried if one was refused."""
        self._tried = [count * self.DECAY for count in self._tried]
        self._kept = [count * self.DECAY for count in self._kept]
        while len(self._tried) < drafted:
            self._tried.append(0.0)
            self._kept.append(0.0)
        for i in range(min(accepted + 1, drafted)):
            self._tried[i] += 1
            self._kept[i] += i < accepted

    def chances(self, k: int) -> list[float]:
        """Of the first k tokens."""
        chances, chance, weight = [], self.prior, self.PRIOR_WEIGHT
        for tried, kept in zip(self._tried[:k], self._kept, strict=False):
            chance = (kept + weight * chance) / (tried + weight)
            chances.append(chance)
        return chances + [chance] * (k - len(chances))

    def chance(self, i: int) -> float:
        """Of token i, counted from 0."""
        return self.chances(i + 1)[i]


def expected_tokens(chances: Iterable[float]) -> float:
    """Tokens that a round emits on average: accepted ones and the target's own."""
    product = total = 1.0
    for chance in chances:
        product *= chance
        total += product
    return total


class AutoDraftLength:
    """The draft length with the highest expected rate (see the module), learnt while it runs; one object for a run.

    - Costs are those of the whole run. Acceptance is learnt anew in each generation, beginning from what the
      generations before had on average.
    - A draft model has to read the prompt before its first draft. If what is still to be emitted could not earn that
      back, none is made.
    - While plain decoding is best, a short draft is tried now and then: each plain round saves up PROBE_SHARE of its
      time, and a probe waits until its own time is saved. One that fails makes the next wait twice as long.

    Args:
        lengths: draft lengths to choose from; 0 is always among them.
        costs: known from before, e.g. measured at warm-up.
    """

    PROBE_SHARE = 0.01
    PROBE_LENGTH = 1
    PRIOR = 0.6  # chance of acceptance before anything is known
    PRIOR_RATE = 0.3  # how much of it each generation replaces with its own
    LONGEST_WAIT = 8

    def __init__(self, lengths: Iterable[int] = range(7), costs: Costs | None = None) -> None:
        self.lengths = sorted({0, *lengths})
        if self.lengths[0] < 0 or self.lengths[-1] > MAX_DRAFT_LENGTH:
            wrong = self.lengths[0] if self.lengths[0] < 0 else self.lengths[-1]
            raise UserError(f"draft length {wrong}: must be between 0 and {MAX_DRAFT_LENGTH}")
        self.costs = costs or Costs()
        self.chosen: list[int] = []  # draft lengths of this generation's rounds
        self._priors: dict[str, float] = {}
        self._acceptance: dict[str, Acceptance] = {}
        self._best: dict[str, int] = {}  # by source, until a round changes what is known
        self._reset(0, 0)

    def begin(self, prompt_tokens: int, max_new_tokens: int) -> None:
        for source, acceptance in self._acceptance.items():
            prior = self._prior(source)
            self._priors[source] = prior + self.PRIOR_RATE * (min(max(acceptance.chance(0), 0.3), 0.9) - prior)
        self._acceptance = {}
        self.chosen = []
        self._reset(prompt_tokens, max_new_tokens - 1)

    def _reset(self, prompt_tokens: int, remaining: int) -> None:
        self._prompt_tokens, self._remaining = prompt_tokens, remaining
        self._read = False  # the draft has read the prompt
        self._saved, self._wait, self._probing = 0.0, 1, False
        self._best.clear()

    def draft_length(self, source: str) -> int:
        k = self._best_length(source)
        ready = self._read or source != "model"  # only a model has to read the prompt first
        if k and not ready and not self._earns_its_reading(source, k):
            k = 0
        self._probing = False
        if k == 0 and ready:
            k = self._probe(source)
        return k

    def pays(self, source: str, reach: float, steps: int, rows: int) -> bool:
        return True

    def read_prompt(self, seconds: float) -> None:
        self._read = True
        self.costs.add("prefill", "model", seconds / max(self._prompt_tokens, 1))

    def update(self, round: Round) -> None:
        self.costs.add_round(round)
        self.chosen.append(round.drafted)
        self._remaining -= round.emitted
        self._best.clear()
        if not round.drafted:
            self._saved += self.PROBE_SHARE / self._wait * round.verify_s
            return
        self._of(round.source).add(round.drafted, round.accepted)
        if self._probing:
            self._wait = 1 if round.accepted else min(2 * self._wait, self.LONGEST_WAIT)

    def rate(self, source: str, k: int) -> float:
        """Expected tokens per second with drafts of k tokens; 0 before any time was measured."""
        seconds = self.costs.round_s(source, k)
        return expected_tokens(self._of(source).chances(k)) / seconds if seconds else 0.0

    def break_even(self, source: str = "model") -> float | None:
        """The acceptance, equal at all positions, from which drafting one token pays; None before it is known."""
        plain = self.costs.round_s(source, 0)
        return self.costs.round_s(source, 1) / plain - 1 if plain else None

    def report(self) -> dict:
        """What it decided with, for people: costs in ms, acceptance by position of the last generation."""

        def milliseconds(what: str) -> dict[str, float]:
            return {str(which): 1000 * seconds for which, seconds in self.costs.known(what).items()}

        drafted = self.costs.known("draft")
        source = "model" if "model" in drafted else next(iter(drafted), None)  # the dearest there is
        return {
            "lengths": self.lengths,
            "verify_ms": milliseconds("verify"),
            "draft_step_ms": milliseconds("draft"),
            "prefill_token_ms": milliseconds("prefill"),
            "break_even": self.break_even(source) if source else None,
            "acceptance": {name: each.chances(self.lengths[-1]) for name, each in self._acceptance.items()},
        }

    def _prior(self, source: str) -> float:
        return self._priors.get(source, self.PRIOR)

    def _of(self, source: str) -> Acceptance:
        if source not in self._acceptance:
            self._acceptance[source] = Acceptance(self._prior(source))
        return self._acceptance[source]

    def _best_length(self, source: str) -> int:
        if source not in self._best:
            self._best[source] = max(self.lengths, key=lambda k: self.rate(source, k))
        return self._best[source]

    def _earns_its_reading(self, source: str, k: int) -> bool:
        """Whether what is still to be emitted saves more time than the draft takes to read the prompt."""
        reading = self.costs.prefill_s(source)
        plain, drafted = self.rate(source, 0), self.rate(source, k)
        if reading is None or not plain or not drafted:
            return True
        return self._remaining * (1 / plain - 1 / drafted) > self._prompt_tokens * reading

    def _probe(self, source: str) -> int:
        """PROBE_LENGTH if its time has been saved up, else 0."""
        k = min(self.PROBE_LENGTH, self.lengths[-1])
        price = self.costs.round_s(source, k) - self.costs.round_s(source, 0)
        if not k or self._saved < price:
            return 0
        self._saved -= price
        self._probing = True
        return k
