"""Log-probabilities of tokens, from the logits that they were chosen from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Score(NamedTuple):
    """A token's log-probability before temperature, top-k and top-p, and the likeliest tokens in its place."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # ids and their log-probabilities, the likeliest first


class Scorer:
    """Reads along with one text, as a `sequence.LogitsReader`; the engine's thread alone uses it.

    Args:
        top: how many of the likeliest tokens are wanted beside the chosen one.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._logits: list[Tensor] = []

    def read(self, logits: Tensor) -> None:
        """As of `LogitsReader`."""
        self._logits.append(logits)

    def take(self, ids: list[int]) -> list[Score]:
        """Scores of the tokens that were emitted since the last call."""
        if not ids:
            return []
        logits = torch.cat(self._logits)[: len(ids)]
        self._logits.clear()
        logprobs = logits.float().log_softmax(-1)
        chosen = logprobs[torch.arange(len(ids)), torch.tensor(ids, device=logits.device)].tolist()
        tops: list[tuple[tuple[int, float], ...]] = [()] * len(ids)
        if self._top:
            values, indices = logprobs.topk(min(self._top, logprobs.shape[-1]))
            pairs = zip(indices.tolist(), values.tolist(), strict=True)
            tops = [tuple(zip(*pair, strict=True)) for pair in pairs]
        return [Score(logprob, top) for logprob, top in zip(chosen, tops, strict=True)]
