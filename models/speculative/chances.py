"""How likely drafted tokens are accepted, learnt from rounds."""

from __future__ import annotations

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
    """What a draft's own probabilities are worth: accepted tokens for each one it expected to have accepted."""

    DECAY = 0.98
    PRIOR_WEIGHT = 5.0  # tokens

    def __init__(self) -> None:
        self._expected = self._accepted = self.PRIOR_WEIGHT

    def add(self, reach: Iterable[float], accepted: int) -> None:
        """A round: the draft's probability of each proposed token and those before it, and how many were kept."""
        self._expected = self._expected * self.DECAY + sum(reach)
        self._accepted = self._accepted * self.DECAY + accepted

    @property
    def factor(self) -> float:
        return self._accepted / self._expected if self._expected else 1.0


def expected_tokens(chances: Iterable[float]) -> float:
    """Tokens that a round emits on average: accepted ones and the target's own."""
    product = total = 1.0
    for chance in chances:
        product *= chance
        total += product
    return total
