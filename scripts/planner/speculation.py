"""Tokens per round from acceptance, and speed-up from tokens and times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.errors import UserError
from models.llama.config import read_json
from models.speculative.formulas import expected_tokens
from scripts.planner.predict import Figure, Times

MAX_DRAFT_LENGTH = 15  # with the token before them 16 rows, up to which a layer keeps its number of programs


@dataclass(frozen=True)
class Acceptance:
    """How likely the first i tokens of a draft are all accepted.

    reached: of the first 1, 2, ... tokens, as far as they are known; beyond, each token is as likely as the last known
    one was after those before it. source: where it is from, for people.
    """

    reached: tuple[float, ...]
    source: str

    @classmethod
    def equal(cls, chance: float) -> Acceptance:
        """Every token is accepted with the same chance, once those before it are."""
        if not 0 <= chance <= 1:
            raise UserError(
                f"--acceptance {chance:g} is outside 0..1: it is the chance that a drafted token is accepted"
            )
        return cls((chance,), f"{chance:.0%} at every position, assumed")

    @classmethod
    def of_run(cls, file: str) -> Acceptance:
        """Measured by a run of the demo, from its JSON. Raises UserError for a file that has none."""
        results = read_json(file)
        speculative = results.get("speculative")
        if not isinstance(speculative, dict):
            raise UserError(f"{file} has no speculative run: write it with demo/simple_text_demo.py --json")
        reached = speculative.get("acceptance_by_position")
        if not isinstance(reached, list) or not reached or not all(_is_chance(value) for value in reached):
            raise UserError(
                f"{file}: speculative.acceptance_by_position is {reached!r}, not a list of numbers within 0..1: "
                "write it with demo/simple_text_demo.py --json"
            )
        settings = results.get("settings") if isinstance(results.get("settings"), dict) else {}
        pair = [Path(str(settings[name])).name for name in ("target", "draft") if settings.get(name)]
        whose = f" by {' and '.join(pair)}" if pair else ""
        if settings.get("drafter") not in (None, "model"):
            whose += f", drafter {settings['drafter']}"  # a plan prices drafts of a model
        if settings.get("num_draft_tokens") == "auto":
            whose += " (lengths chosen by auto, so that later positions are easy places: better --num-draft-tokens 6)"
        return cls(tuple(map(float, reached)), f"measured{whose} at positions 1 to {len(reached)}, {Path(file).name}")

    @property
    def known(self) -> int:
        return len(self.reached)

    def chances(self, k: int) -> list[float]:
        """Of each of the first k tokens to be accepted, once those before it are."""
        before = (1.0, *self.reached)
        known = [min(now / then, 1.0) if then else 0.0 for then, now in zip(before, self.reached, strict=False)]
        return (known + [known[-1]] * k)[:k]


def _is_chance(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


# ---- rounds ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """A way to draft and verify: milliseconds [models] of its parts, and the tokens it gives on average."""

    k: int
    tokens: float
    drafting: np.ndarray
    verifying: np.ndarray
    between: np.ndarray

    def ms(self, draft_factor: float = 1.0) -> np.ndarray:
        return draft_factor * self.drafting + self.verifying + self.between

    @property
    def tok_s(self) -> np.ndarray:
        return 1000 * self.tokens / self.ms()


def chain(times: Times, acceptance: Acceptance, k: int) -> Round:
    """k tokens drafted one after the other; k = 0 is plain decoding."""
    tokens = expected_tokens(acceptance.chances(k))
    return Round(k, tokens, times.drafting(k), times.verifying(k + 1), times.between(k))


def best(make: Callable[[int], Round], lengths: Sequence[int]) -> Round:
    """The round with the most tokens per second by the central model."""
    return max(map(make, lengths), key=lambda round: round.tok_s[0])


def speedup(times: Times, round: Round) -> Figure:
    """Over plain decoding. Its band moves the draft against the target by the spread of held-out figures."""
    return _ratio(times, lambda factor: round.tokens * times.decode() / round.ms(factor))


def gain(times: Times, round: Round, over: Round) -> Figure:
    """Tokens per second over those of another round."""
    return _ratio(times, lambda factor: round.tokens / round.ms(factor) * over.ms(factor) / over.tokens)


def _ratio(times: Times, values: Callable[[float], np.ndarray]) -> Figure:
    spread = times.family.spread
    span = np.concatenate([values(1 - spread), values(1.0), values(1 + spread)])
    return Figure(float(values(1.0)[0]), float(span.min()), float(span.max()))
