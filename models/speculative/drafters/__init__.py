"""Ways to guess the next tokens, one file each. A drafter can make text faster, never different."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

# How many tokens a source of drafts ("model", "lookup", ..) may propose now; 0: none.
Limit = Callable[[str], int]


class Draft(NamedTuple):
    """Proposed continuation, at most as long as asked for; empty means that the next token is decoded plainly.

    probs[k, V]: the law each token was drawn from (temperature, top-k and top-p applied); None when tokens were
    chosen deterministically. Seconds spent on reading the prompt, once per generation, go into prefill_s.
    source: what drafted, for costs and acceptance of their own.
    verified: where the target has already checked a greedy draft in the same device program, how many tokens it
    accepted and its own id after them.
    """

    tokens: list[int]
    probs: Tensor | None = None
    prefill_s: float = 0.0
    verified: tuple[int, int] | None = None
    source: str = "model"


class Drafter(Protocol):
    """What the loop asks of a drafter: one object per generation, `propose` and `observe` in turn.

    Sampling stays lossless only if whether position i is proposed does not depend on the token drawn for i: a
    drafter that stops early may look at the law of i or at earlier tokens, and keeps what it has drawn.
    """

    def propose(self, tokens: list[int], limit: Limit) -> Draft:
        """Up to limit(source) tokens to follow `tokens`: the prompt and everything emitted. Not to be changed or kept.

        Between two calls the sequence may have grown by any number of tokens, also by ones never proposed.
        """

    def observe(self, accepted: int) -> None:
        """How many of the tokens last proposed were kept; not called when none were proposed."""
