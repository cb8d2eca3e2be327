"""Drafting with an EAGLE-3 head, which reads the target's own hidden states.

Source: Li et al. 2025 (EAGLE-3). After a verification the accepted positions are computed again, with the states that
the target has now made of them: a head that goes on from its own guesses drifts away from its target.
"""

import math
import time
from collections.abc import Generator, Sequence
from typing import cast

import torch

from models.speculative.drafters import Limit
from models.speculative.drafters.in_step import Answer, Ask, Reads, Steps
from models.speculative.drafters.model import ModelDrafter
from models.speculative.drafters.tree import TreeDrafter
from models.speculative.model import Features, HeadModel


class _Head(ModelDrafter):
    """What the drafters of chains and trees share. One object per generation: it owns the head's slot meanwhile.

    `cached` counts the leading tokens whose rows were computed with the target's states: drafted ones never are.
    """

    model: HeadModel

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the target whose hidden states the head reads."""
        return self.model.taps

    def states(self, features: Features, rows: Sequence[int], position: int) -> None:
        """The target has computed rows of the text, whoever drafted them."""
        self.model.states(features, rows, position)

    def resume(self, held: int) -> None:
        """The head's cache holds the rows of positions 1 to `held`."""
        self.cached = held + 1

    def _last_logits(self, tokens: list[int], position: int) -> torch.Tensor:
        """Without those of the rows before, which nobody needs."""
        if len(tokens) > 1 and self.model.lasting:
            logits = self.model.read(tokens, position)
            assert logits is not None  # states are in the host's reach
            return logits[None]
        return super()._last_logits(tokens, position)

    def _steps(self, tokens: list[int], limit: Limit, company: bool) -> Steps:
        """As of `ModelDrafter`. Where nothing is drafted, states that would not last are read."""
        draft = yield from super()._steps(tokens, limit, company)
        if draft.tokens or draft.fused:
            return draft
        return draft._replace(prefill_s=draft.prefill_s + self.settle(tokens), source=self.source)

    def settle(self, tokens: list[int]) -> float:
        """Before a forward of the target that this head drafts nothing for: compute the rows of all tokens, if the
        states before them would be gone after it. Returns seconds."""
        began, first = time.perf_counter(), self.cached or 1
        if self.model.lasting or first >= len(tokens):
            return 0.0
        self.model.read(tokens[first:], first)
        self.cached = len(tokens)
        return time.perf_counter() - began

    def _reading(self, tokens: list[int], company: bool) -> Generator[Ask, Answer, float]:
        """As `read`; in company it is others that compute, and clock it. States that do not last are read at once."""
        if not (company and self.model.lasting):
            return self.read(tokens)
        if text := self._text(tokens):
            chance, _ = cast("tuple[float, int]", (yield Ask(*text, Reads.NOTHING)))
            self._read_all(tokens, chance)
        return 0.0

    def read_before_round(self, tokens: list[int]) -> None:
        """Nothing: a round feeds all rows whose states are known."""

    def observe(self, accepted: int) -> None:
        """Nothing to keep: rows of drafted tokens are computed again."""

    def read(self, tokens: list[int]) -> float:
        """Compute the rows of all but the last token, which every round feeds itself, where they are more than a round
        takes with it. Returns seconds."""
        began = time.perf_counter()
        if text := self._text(tokens):
            logits = self.model.read(*text)
            self._read_all(tokens, 0.0 if logits is None else logits[0].item())
        return time.perf_counter() - began

    def _text(self, tokens: list[int]) -> tuple[list[int], int] | None:
        """What has to be read before a round: tokens, and the position of the first of them."""
        first = self.cached = self.cached or 1  # the first token of a text has no row
        rest = len(tokens) - first
        return None if rest < 2 or (first > 1 and rest <= self.model.max_rows) else (tokens[first:-1], first)

    def _read_all(self, tokens: list[int], number: float) -> None:
        """All but the last token were read, which made such a number."""
        self._broken = not math.isfinite(number)
        self.cached = len(tokens) - 1


class HeadDrafter(_Head):
    """A head that drafts chains.

    Args:
        model: the head, in the sequence's slot.
        sampling, confident, rounds: as of `ModelDrafter`.
    """

    source = "head"


class HeadTreeDrafter(_Head, TreeDrafter):
    """A head that drafts trees of at most so many tokens. Arguments and errors are those of `TreeDrafter`."""

    model: HeadModel
