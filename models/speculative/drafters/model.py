"""Drafting with a smaller model of the same vocabulary."""

import time

import torch

from models.speculative.acceptance import distribution, sample
from models.speculative.drafters import Draft, Limit
from models.speculative.language_model import LanguageModel
from models.speculative.sampling import SamplingParams


class ModelDrafter:
    """A LanguageModel that runs ahead of the target. One object per generation: it owns the model's cache meanwhile.

    Greedy drafts are chosen by argmax and move only ids; sampled ones are drawn with the target's own temperature,
    top-k and top-p, from a stream of random numbers of their own.
    """

    source = "model"

    def __init__(self, model: LanguageModel, sampling: SamplingParams) -> None:
        self.model = model
        self.sampling = sampling
        self.cached = 0  # leading tokens of the sequence that the model's cache holds rightly
        self._ahead = 0  # drafted tokens that it holds beyond those
        self._generator = sampling.generator("draft")

    def propose(self, tokens: list[int], limit: Limit) -> Draft:
        """Draft as many tokens as allowed and as the model's own context has room for, after catching up."""
        k = min(limit(self.source), self.model.max_seq_len - len(tokens) + 1)  # the last one drafted is not written
        if k < 1:
            return Draft([])
        prefill_s = self.read_prompt(tokens)
        while len(tokens) - self.cached > self.model.max_rows:
            self.model.greedy(tokens[self.cached : self.cached + self.model.max_rows], self.cached)
            self.cached += self.model.max_rows
        position, pending = self.cached, tokens[self.cached :]
        self.fed(tokens, k)
        if self.sampling.greedy:
            return Draft(self.model.draft_greedy(pending, position, k), None, prefill_s)
        return self._draw(pending, position, k, prefill_s)

    def observe(self, accepted: int) -> None:
        """Advance over the kept tokens: all kept leaves the last, which was never fed, and its successor to feed."""
        self.cached += min(accepted, self._ahead)

    def fed(self, tokens: list[int], k: int) -> None:
        """Note that the cache now holds all of `tokens`, and of k tokens drafted after them all but the last."""
        self.cached, self._ahead = len(tokens), k - 1

    def read_prompt(self, tokens: list[int]) -> float:
        """Before the first draft: read all but the last token, which every round feeds itself. Returns seconds."""
        if self.cached:
            return 0.0
        began = time.perf_counter()
        if len(tokens) > 1:
            self.model.prefill(tokens[:-1])[0].item()  # reading a number waits for the device
        self.cached = len(tokens) - 1
        return time.perf_counter() - began

    def _draw(self, pending: list[int], position: int, k: int, prefill_s: float) -> Draft:
        params, drafted, laws = self.sampling, [], []
        for _ in range(k):
            logits = self.model.forward(pending, position)[-1:]
            laws.append(distribution(logits, params.temperature, params.top_k, params.top_p))
            drafted.append(sample(laws[-1][0], self._generator))
            position, pending = position + len(pending), drafted[-1:]
        return Draft(drafted, torch.cat(laws), prefill_s)
