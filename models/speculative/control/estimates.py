"""How likely drafted tokens are accepted, learnt from rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable


class Acceptance:
    """How likely token i of a draft is accepted once those before it are, for one source of drafts.

    Counts fade by `decay` with every round that drafted. What is not known of a position is assumed to be as in
    `parent` (what was learnt in other texts); without one, as at the position before, for the first one `prior`.
    """

    PRIOR_WEIGHT = 2.0  # an assumption counts as much as so many rounds,
    PARENT_WEIGHT = 4.0  # one that was learnt as so many

    def __init__(self, prior: float, *, decay: float = 0.97, parent: Acceptance | None = None) -> None:
        self.prior, self.decay, self.parent = prior, decay, parent
        self._weight = self.PARENT_WEIGHT if parent else self.PRIOR_WEIGHT
        self._tried: list[float] = []
        self._kept: list[float] = []

    def add(self, drafted: int, accepted: int, next_chance: float | None = None) -> None:
        """A round kept `accepted` of `drafted` tokens: that many held, and one more was tried if one was refused.

        next_chance: where the draft stopped of itself, how likely the token would have been accepted that it left
        out; it counts as that much of a token, so that chances are not those of the easy places alone.
        """
        self._tried = [count * self.decay for count in self._tried]
        self._kept = [count * self.decay for count in self._kept]
        while len(self._tried) <= drafted:
            self._tried.append(0.0)
            self._kept.append(0.0)
        for i in range(min(accepted + 1, drafted)):
            self._tried[i] += 1
            self._kept[i] += i < accepted
        if next_chance is not None and accepted == drafted:
            self._tried[drafted] += 1
            self._kept[drafted] += next_chance

    def chances(self, k: int) -> list[float]:
        """Of the first k tokens."""
        chances, chance, weight = [], self.prior, self._weight
        assumed = self.parent.chances(k) if self.parent else None
        for i in range(k):
            if assumed:
                chance = assumed[i]
            if i < len(self._tried):
                chance = (self._kept[i] + weight * chance) / (self._tried[i] + weight)
            chances.append(chance)
        return chances

    def chance(self, i: int) -> float:
        """Of token i, counted from 0."""
        return self.chances(i + 1)[i]

    def next_chance(self) -> float:
        """Of any one token that is tried, whatever its position."""
        prior = self.parent.next_chance() if self.parent else self.prior
        return (sum(self._kept) + self._weight * prior) / (sum(self._tried) + self._weight)


class Trust:
    """What a draft's own probabilities are worth: to the power of `power` they expect as many accepted tokens as there
    were. Below 1: it is right more often than it says, as where its second choices are nobody's. Above 1: too sure.

    A power, since no factor does: of tokens the embedded draft gives 14 %, 30 % were accepted, of those at 96 %, all.
    """

    POWERS = tuple(2 ** (i / 2) for i in range(-4, 4))  # 1/4 to 2.8
    DECAY = 0.98
    PRIOR = (0.75, 0.5, 0.25) * 3  # as if these had been proposed, and accepted as often as they say

    def __init__(self) -> None:
        self._expected = [sum(each**power for each in self.PRIOR) for power in self.POWERS]  # tokens, by power
        self._accepted = sum(self.PRIOR)
        self.power = 1.0

    def add(self, path_probs: Iterable[float], accepted: int) -> None:
        """A round: the draft's probability of each proposed token and those before it, and how many were kept."""
        logs = [math.log(each) for each in path_probs if each > 0]
        self._accepted = self._accepted * self.DECAY + accepted
        exp = math.exp
        self._expected = [
            expected * self.DECAY + sum([exp(power * log) for log in logs])
            for expected, power in zip(self._expected, self.POWERS, strict=True)
        ]
        self.power = self._fitting()

    def chance(self, path_prob: float) -> float:
        """How likely a token is accepted to which the draft gives this probability."""
        return path_prob**self.power

    def path_prob(self, chance: float) -> float:
        """The probability that a draft gives a token which is accepted with this chance."""
        return max(0.0, chance) ** (1 / self.power)

    def _fitting(self) -> float:
        """Between the powers that expect a little more and a little less than was accepted, in proportion."""
        above = next((i for i, expected in enumerate(self._expected) if expected <= self._accepted), len(self.POWERS))
        if above in (0, len(self.POWERS)):
            return self.POWERS[min(above, len(self.POWERS) - 1)]
        more, less = self._expected[above - 1], self._expected[above]
        share = (more - self._accepted) / (more - less) if more > less else 0.0
        return self.POWERS[above - 1] * (self.POWERS[above] / self.POWERS[above - 1]) ** share
