"""Drafting without a model: what followed the last time these tokens stood in the prompt or in the text so far.

Source: prompt lookup decoding (Saxena 2023); here with an index, so that a round costs the same at any length.
"""

import time

from models.speculative.drafters import Draft, Limit

LONGEST = 6  # tokens of context that are matched, the longest first
SHORTEST = 2
TELLING = 4  # from so many on, a match says more than a shorter one: they are two sources to the controller


class PromptLookup:
    """Copies what followed the most recent earlier occurrence of the last 6 tokens, else of the last 5, .. 2.

    Every token enters the index once, under each of these lengths: O(1) a token. A copy that runs into the end of the
    text goes on with itself, so that a repeated pattern is drafted at any length. Deterministic: no probabilities.
    """

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> position of what followed its latest occurrence
        self._indexed = 0  # leading tokens that are in the index as followers

    def propose(self, tokens: list[int], limit: Limit) -> Draft:
        """limit("lookup") tokens, or limit("lookup-short") where fewer than 4 match; none, and the limit is not asked
        for, where the last two stand nowhere earlier. The first call enters the whole prompt: its prefill_s."""
        began = 0.0 if self._indexed else time.perf_counter()
        self._index(tokens)
        prefill_s = time.perf_counter() - began if began else 0.0
        start, matched = self._find(tokens)
        if not matched:
            return Draft([], prefill_s=prefill_s, source="lookup")
        source = "lookup" if matched >= TELLING else "lookup-short"
        copied: list[int] = []
        for position in range(start, start + limit(source)):
            copied.append(tokens[position] if position < len(tokens) else copied[position - len(tokens)])
        return Draft(copied, prefill_s=prefill_s, source=source)

    def observe(self, accepted: int) -> None:
        """Nothing to learn: the text itself says what was kept."""

    def _index(self, tokens: list[int]) -> None:
        for n in range(SHORTEST, LONGEST + 1):
            for position in range(max(self._indexed, n), len(tokens)):
                self._after[tuple(tokens[position - n : position])] = position
        self._indexed = len(tokens)

    def _find(self, tokens: list[int]) -> tuple[int, int]:
        """Where the copy starts, and how many tokens match before it; no token: nothing was found."""
        for n in range(LONGEST, SHORTEST - 1, -1):
            position = self._after.get(tuple(tokens[-n:]))
            if position is not None:
                return position, n
        return 0, 0
