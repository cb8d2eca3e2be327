"""Drafting and verification in one device program, where both models share the device."""

from collections.abc import Sequence
from typing import Protocol

from models.speculative.drafters import Draft, Limit
from models.speculative.drafters.model import ModelDrafter
from models.speculative.language_model import LanguageModel
from models.speculative.sampling import SamplingParams


class FusedGreedy(Protocol):
    """A greedy round of two models as one program, such as `models.llama.ttnn_llama.fused.FusedRound`."""

    max_draft: int  # the longest draft it can make; 0: none

    def run(self, tokens: Sequence[int], position: int, k: int) -> tuple[list[int], list[int], int]:
        """Feed the sequence's last two tokens, draft k, verify: (drafted [k], the target's ids [k + 1], accepted)."""


class FusedDrafter:
    """Proposes drafts that come verified, for greedy decoding with batched verification.

    Every round feeds the last two tokens, whether the draft has seen the first of them or not, so that there is one
    program for all rounds. What does not fit one (a longer draft, a draft model that is further behind, a sequence
    of one token) is drafted by the model alone and verified by the loop.

    fused: of the target that verifies and of ``model``. model: the draft; owned for the time of a generation.
    """

    def __init__(self, fused: FusedGreedy, model: LanguageModel) -> None:
        self._fused = fused
        self._alone = ModelDrafter(model, SamplingParams())

    def propose(self, tokens: list[int], limit: Limit) -> Draft:
        """Draft as many tokens as allowed, verified; fewer where the draft model's context ends."""
        alone = self._alone
        allowed = limit(alone.source)
        k = min(allowed, alone.model.max_seq_len - len(tokens) + 1)
        behind = len(tokens) - alone.cached if alone.cached else 1  # reading the prompt leaves one
        if not 0 < k <= self._fused.max_draft or behind > 2 or len(tokens) < 2:
            return alone.propose(tokens, Limit(lambda source: allowed))
        prefill_s = alone.read_prompt(tokens)
        drafted, verified, accepted = self._fused.run(tokens[-2:], len(tokens) - 2, k)
        alone.fed(tokens, k)
        return Draft(drafted, None, prefill_s, (accepted, verified[accepted]))

    def observe(self, accepted: int) -> None:
        """Advance the draft over the kept tokens."""
        self._alone.observe(accepted)
