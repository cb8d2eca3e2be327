"""How the next token is chosen from the target's logits."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING

from models.errors import UserError

if TYPE_CHECKING:  # command lines import this and answer at once
    import torch

MIN_TEMPERATURE = 1e-4  # far below this, scaled logits leave the range of fp32


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0 and top_p 1 are off; equal seeds give equal text.

    Order: temperature, then the top_k likeliest tokens, then the fewest of those that hold top_p of their mass.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            if not isinstance(getattr(self, name), Real):
                raise UserError(f"{name} {getattr(self, name)!r}: must be a number")
        for name in ("top_k", "seed"):
            if not isinstance(getattr(self, name), Integral):
                raise UserError(f"{name} {getattr(self, name)!r}: must be a whole number")
        if not (self.temperature == 0 or (math.isfinite(self.temperature) and self.temperature >= MIN_TEMPERATURE)):
            raise UserError(f"temperature {self.temperature}: must be 0 (greedy) or at least {MIN_TEMPERATURE}")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: must be 0 (off) or a positive number of tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be above 0 and at most 1 (off)")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def generator(self, stream: str) -> torch.Generator:
        """A CPU source of random numbers of its own for each (seed, stream), whatever device the logits are on.

        Target and draft must not share one: the decision about a token has to be independent of its drawing.
        """
        import torch

        return torch.Generator().manual_seed(random.Random(f"{self.seed}/{stream}").getrandbits(64))
