"""What theory says about rounds of drafting and verifying (Leviathan et al. 2023).

Chances are those of a drafted token to be accepted, once all before it are. CostModel are in plain decoding steps.
"""

from collections.abc import Iterable


def tokens_by_length(chances: Iterable[float]) -> list[float]:
    """Tokens that a round emits on average, accepted ones and the target's own, if it drafts 0, 1, 2, .. tokens."""
    reached, tokens = 1.0, [1.0]
    for chance in chances:
        reached *= chance
        tokens.append(tokens[-1] + reached)
    return tokens


def expected_tokens(chances: Iterable[float]) -> float:
    """Tokens that a round emits on average if it drafts one for each chance: 1 + a1 + a1 a2 + ..."""
    return tokens_by_length(chances)[-1]


def with_rescue(chances: Iterable[float], rescue: float) -> list[float]:
    """Chances where another token stands beside each and is right in that share of the cases in which it is wrong."""
    return [chance + (1 - chance) * rescue for chance in chances]


def break_even(k: int, cost: float, rescue: float = 0.0) -> float | None:
    """The chance, equal for k tokens, from which a round of `cost` plain steps gives `cost` tokens.

    0 if it gives them anyway, None if even k + 1 tokens are too few. rescue: see `with_rescue`.
    """

    def enough(chance: float) -> bool:
        return expected_tokens(with_rescue([chance] * k, rescue)) >= cost

    if enough(0.0):
        return 0.0
    if not enough(1.0):
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
