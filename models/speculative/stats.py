"""What happened in a generation, with the definition of every number. Times are wall-clock seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from models.speculative.tree import tree_levels


class Joint(NamedTuple):
    """The step that a round shared with other sequences: what its forwards cost, and whom they served."""

    sequences: int  # whose rows were in the target's forward
    rows: int  # of all of them; prompts apart
    context: int  # positions that they read: those of all these sequences
    prompt_rows: int  # of prompts that were read in the same forward
    verify_s: float  # of that forward
    drafting: int  # sequences that were drafted for in the same forwards; 0: this one by itself
    draft_s: float  # of that drafting
    draft_steps: int  # and how many forwards these were


@dataclass
class Round:
    """One pass of the loop: draft, verify, accept, emit."""

    drafted: int
    accepted: int
    emitted: int  # accepted + 1, less what a stop token or an interruption cut off
    draft_s: float = 0.0  # inside drafters, but for their reading of prompts
    verify_s: float = 0.0  # inside the target
    host_s: float = 0.0  # the rest: accepting, bookkeeping, and what other sequences needed for themselves
    cut: bool = False  # a stop token or interruption ended inside it, or a limit shortened its draft
    source: str = "model"  # what drafted, if anything was
    proposed: tuple[int, ...] = ()  # the drafted tokens
    parents: tuple[int, ...] | None = None  # of a tree: index of each token's parent among them, -1 for the text
    kept: tuple[int, ...] = ()  # indices of the accepted ones
    path_probs: tuple[float, ...] = ()  # the draft's probability of each and those before it, where it told
    joint: Joint | None = None  # where other sequences shared the step: all waited for its whole time

    @property
    def depth(self) -> int:
        """Tokens that could have been accepted: all of a chain, the longest chain of a tree."""
        return self.drafted if self.parents is None else tree_levels(self.parents)


@dataclass
class GenerationStats:
    """Counts and times of one generation, or of several merged.

    Rates are taken over the rounds that drafted and were not cut: a cut round had no chance to show its length.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, whose keys and values another text had left in the cache
    draft_reused_tokens: int = 0  # the same of the draft model's, or the head's, cache
    tokens: int = 0  # emitted, the first and a stop token included
    ttft_s: float = 0.0  # target prefill and choice of the first token; merged: the mean
    draft_prefill_s: float = 0.0  # the drafter's reading of the prompt, a part of decode_s
    decode_s: float = 0.0  # from the first token to the last, less the time the consumer held a token
    rounds: list[Round] = field(default_factory=list)
    # "stop", "length", "context" or "interrupted"; "" while running, or where merged ones differ
    finish_reason: str = ""
    generations: int = 1
    # what its drafter raised or proposed wrongly, after which it was decoded plainly; "": nothing; merged: the first
    drafting_failure: str = ""

    @property
    def decode_tokens(self) -> int:
        """Emitted tokens that decoding produced: all but the first of each generation."""
        return max(self.tokens - self.generations, 0)

    @property
    def tok_s(self) -> float:
        """decode_tokens / decode_s, drafting and host work included; 0 if there are none."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted tokens, of trees / levels; 0 if nothing was drafted."""
        drafted = sum(r.depth for r in self._rated)
        return sum(r.accepted for r in self._rated) / drafted if drafted else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted / rounds: tokens per target forward, the target's own included; 1 if nothing was drafted."""
        return 1 + sum(r.accepted for r in self._rated) / max(len(self._rated), 1)

    @property
    def acceptance_by_position(self) -> list[float]:
        """Entry i: rounds that accepted more than i tokens / rounds whose draft was longer than i."""
        rounds = [(r.accepted, r.depth) for r in self._rated]
        longest = max((depth for _, depth in rounds), default=0)
        return [
            sum(accepted > i for accepted, _ in rounds) / sum(depth > i for _, depth in rounds) for i in range(longest)
        ]

    @property
    def draft_ms(self) -> float:
        """Mean milliseconds of a round in the drafter."""
        return self._mean_ms("draft_s")

    @property
    def verify_ms(self) -> float:
        """Mean milliseconds of a round in the target."""
        return self._mean_ms("verify_s")

    @property
    def host_ms(self) -> float:
        """Mean milliseconds of a round outside both."""
        return self._mean_ms("host_s")

    @property
    def host_share(self) -> float:
        """Part of all rounds' time spent outside drafter and target, 0 to 1."""
        host = sum(r.host_s for r in self.rounds)
        total = host + sum(r.draft_s + r.verify_s for r in self.rounds)
        return host / total if total else 0.0

    @classmethod
    def merge(cls, parts: Iterable[GenerationStats]) -> GenerationStats:
        """Several generations as one: sums, all rounds, the mean ttft_s of those that got as far as a first token."""
        parts = list(parts)
        begun = [part for part in parts if part.tokens]
        generations = sum(part.generations for part in begun)
        reasons = {part.finish_reason for part in parts}
        return cls(
            prompt_tokens=sum(part.prompt_tokens for part in parts),
            reused_tokens=sum(part.reused_tokens for part in parts),
            draft_reused_tokens=sum(part.draft_reused_tokens for part in parts),
            tokens=sum(part.tokens for part in parts),
            ttft_s=sum(part.ttft_s * part.generations for part in begun) / max(generations, 1),
            draft_prefill_s=sum(part.draft_prefill_s for part in parts),
            decode_s=sum(part.decode_s for part in parts),
            rounds=[r for part in parts for r in part.rounds],
            finish_reason=reasons.pop() if len(reasons) == 1 else "",
            generations=generations,
            drafting_failure=next((part.drafting_failure for part in parts if part.drafting_failure), ""),
        )

    @property
    def _rated(self) -> list[Round]:
        return [r for r in self.rounds if r.drafted and not r.cut]

    def _mean_ms(self, name: str) -> float:
        """Over the rated rounds; where there are none (plain decoding) over all."""
        rounds = self._rated or self.rounds
        return 1000 * sum(getattr(r, name) for r in rounds) / max(len(rounds), 1)
