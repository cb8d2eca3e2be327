"""What theory says about speculative decoding (Leviathan et al. 2023), in costs relative to one plain step.

a: chance that a drafted token is accepted once those before it are. c: cost of drafting one token. v: cost of a
verification of K + 1 rows. K: drafted tokens a round.
"""

from collections.abc import Iterable

from models.speculative import formulas
from models.speculative.formulas import expected_tokens
from models.speculative.stats import Round


def speedup(a: float, k: int, c: float, v: float) -> float:
    """(1 - a^(K+1)) / ((1 - a) (c K + v)): tokens per second over those of plain decoding."""
    return expected_tokens([a] * k) / (c * k + v)


def break_even(k: int, c: float, v: float) -> float | None:
    """The acceptance from which drafting K tokens pays; 0 if it always does, None if it never can."""
    return formulas.break_even(k, c * k + v)


def acceptance(rounds: Iterable[Round]) -> float | None:
    """The one chance a that explains the rounds best: accepted / tried tokens. A refused token was tried, those behind
    it were not. None if nothing was tried; rounds that were cut short are left out."""
    rounds = [round for round in rounds if round.drafted and not round.cut]
    tried = sum(min(round.accepted + 1, round.depth) for round in rounds)
    return sum(round.accepted for round in rounds) / tried if tried else None
