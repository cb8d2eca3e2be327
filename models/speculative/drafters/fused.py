"""Drafting and verification in one device program, where both models share the device."""

from collections.abc import Sequence
from typing import Protocol

from models.speculative.drafters import Draft, Limit
from models.speculative.drafters.model import ModelDrafter
from models.speculative.model import LanguageModel
from models.speculative.sampling import SamplingParams


class FusedGreedy(Protocol):
    """A greedy round of two models as one program, such as `models.ttnn_llama.programs.fused.FusedRound`."""

    draft_lengths: Sequence[int]  # there is a program for, in rising order

    def run(self, tokens: Sequence[int], position: int, k: int) -> tuple[list[int], list[int], int]:
        """Feed the sequence's last two tokens, draft k, verify: (drafted [k], the target's ids [k + 1], accepted).

        k: up to the longest there is a program for.
        """


class FusedDrafter:
    """Proposes drafts that come verified, for greedy decoding with batched verification.

    Every round feeds the last two tokens, whether the draft has seen the first of them or not, so that there is one
    program for all rounds of a length. Asked for a length between two that there are programs for, it drafts the
    shorter: a program costs the same whatever is used of it. A draft model that is further behind reads first what it
    lacks. What fits no round (a sequence of one token, or no program) is drafted by the model alone and verified by
    the loop.

    fused: of the target that verifies and of ``model``. model: the draft; owned for the time of a generation. alone:
    the drafter that has it (default: a `ModelDrafter`), such as an `EarlyExit` with the same layers.
    """

    def __init__(self, fused: FusedGreedy, model: LanguageModel, alone: ModelDrafter | None = None) -> None:
        self._fused = fused
        self._alone = alone or ModelDrafter(model, SamplingParams())
        self.source = self._alone.source

    def propose(self, tokens: list[int], limit: Limit) -> Draft:
        """Draft at most as many tokens as allowed, verified; fewer where the draft model's context ends."""
        alone, model = self._alone, self._alone.model
        k = self._prepared(min(limit(self.source), model.max_seq_len - len(tokens) + 1))
        if k < 1 or not self._fused.draft_lengths or len(tokens) < 2:
            return alone.propose(tokens, Limit(lambda source: k))
        prefill_s = alone.read(tokens)
        if len(tokens) - alone.cached > 2:
            model.greedy(tokens[alone.cached : -2], alone.cached)
        drafted, verified, accepted = self._fused.run(tokens[-2:], len(tokens) - 2, k)
        alone.fed(tokens, k)
        return Draft(drafted, None, prefill_s, (accepted, verified[accepted]), self.source)

    def observe(self, accepted: int) -> None:
        """Advance the draft over the kept tokens."""
        self._alone.observe(accepted)

    def _prepared(self, k: int) -> int:
        """The longest length up to k that there is a program for; k itself where all are longer."""
        return max((length for length in self._fused.draft_lengths if length <= k), default=k)
