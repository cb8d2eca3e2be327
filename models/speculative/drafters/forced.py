"""Acceptance by decree, for tests and for measuring costs: not a way to draft.

It proposes the target's own next tokens, known from a plain run of the same prompt, as often as it is told to, and else
a wrong one. What it says about speed is how the machine would fare with a draft that is so often right and costs
nothing; reports label it as forced.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence

from models.errors import UserError
from models.speculative.drafters import MAX_DRAFT_LENGTH, Draft, Limit

Forced = float | tuple[int, ...]


def check_forced(acceptance: object) -> None:
    """Raise UserError for what is neither a chance from 0 to 1 nor the accepted tokens of rounds, 0 to 31 each."""
    if isinstance(acceptance, tuple) and acceptance:
        depths = [each for each in acceptance if isinstance(each, int) and 0 <= each <= MAX_DRAFT_LENGTH]
        if len(depths) == len(acceptance):
            return
    elif isinstance(acceptance, int | float) and 0 <= acceptance <= 1:
        return
    raise UserError(
        f"forced acceptance {acceptance!r}: give a chance from 0 to 1, or the accepted tokens of each round in turn, "
        f"0 to {MAX_DRAFT_LENGTH}"
    )


def parsed_forced(text: str) -> Forced:
    """As it is typed: 0.8, or 3,0,4 for the accepted tokens of each round in turn. Raises UserError for others."""
    acceptance: Forced | str = text
    with contextlib.suppress(ValueError):
        acceptance = tuple(int(part) for part in text.split(",")) if "," in text else float(text)
    check_forced(acceptance)
    assert not isinstance(acceptance, str)
    return acceptance


class ForcedDrafter:
    """Proposes what is known to follow, wrong where it is told to be.

    Args:
        text: that follows the prompt, by plain greedy decoding.
        prompt_tokens: of the prompt.
        acceptance: the chance of each token once those before it are right, or the right tokens of each round in turn.
        vocabulary: of the target.
        seed: of the chances. What is proposed at a place of a text depends on nothing else.
    """

    def __init__(
        self, text: Sequence[int], prompt_tokens: int, acceptance: Forced, vocabulary: int, seed: int = 0
    ) -> None:
        check_forced(acceptance)
        self._text = text
        self._prompt_tokens = prompt_tokens
        self._acceptance = acceptance
        self._vocabulary = vocabulary
        self._seed = seed
        self._rounds = 0

    def propose(self, tokens: list[int], limit: Limit) -> Draft:
        """limit("forced") tokens, as far as the text is known; none once it has become another one."""
        done = len(tokens) - self._prompt_tokens
        if done < 1 or done > len(self._text) or tokens[-1] != self._text[done - 1]:
            return Draft([])
        ahead = list(self._text[done : done + limit("forced")])
        if not ahead:
            return Draft([])
        if isinstance(self._acceptance, tuple):
            right = self._acceptance[self._rounds % len(self._acceptance)]
        else:
            draw = random.Random(f"{self._seed}/{done}/{tokens[self._prompt_tokens - 1]}")
            right = next((i for i in range(len(ahead)) if draw.random() >= self._acceptance), len(ahead))
        self._rounds += 1
        if right < len(ahead):
            ahead[right] = (ahead[right] + 1) % self._vocabulary
        return Draft(ahead, source="forced")

    def observe(self, accepted: int) -> None:
        """Nothing to learn."""
