"""A text that is being written: what was asked for, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple, Protocol

from models.errors import NotFinite, UserError
from models.speculative.control.policy import Controller, DraftPolicy, FixedDraftLength
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.speculative.drafters import Drafter
    from models.speculative.model import Features, Limits

VERIFICATIONS = ("batched", "sequential")
WAITING = -1  # in place of a slot


class Token(NamedTuple):
    """An emitted token and where it came from.

    origin: "prefill" (the first), "plain" (no draft), "drafted" (and accepted), "corrected" (the target's, in
    place of a rejected one) or "bonus" (the target's, after a draft accepted in full).
    """

    id: int
    origin: str


class Watcher(Protocol):
    """Reads along, token by token, and says where the text ends: for stop strings."""

    def push(self, token: Token) -> bool:
        """Take the next token; True: the text ends with it."""
        ...


class LogitsReader(Protocol):
    """Wants to see what tokens are chosen from: for log-probabilities."""

    def read(self, logits: Tensor) -> None:
        """Take the target's logits [m, V] that the next m tokens of the text are chosen from, before sampling changes
        them. A stop, or the end, may leave out the last of these tokens."""
        ...


@dataclass(frozen=True)
class Request:
    """A text that is asked for.

    Args:
        prompt: token ids.
        sampling: how tokens are chosen.
        max_new_tokens: how many at most.
        stop_ids: tokens that end the text; they are emitted.
        watcher: ends the text too, or None.
        drafter: proposes tokens; None: every token is decoded plainly.
        controller: how many; None: `FixedDraftLength()`, and none without a drafter.
        verification: "batched", or "sequential" for one token a forward up to the first rejection: the same text,
            slower, there to be compared.
        reuse: whether keys and values may be taken over that another text, which began alike, has left in the cache.
        reader: sees the logits of every token, so that greedy texts compute them too; None: nobody does.
    """

    prompt: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int = 128
    stop_ids: frozenset[int] = frozenset()
    watcher: Watcher | None = None
    drafter: Drafter | None = None
    controller: Controller | None = None
    verification: str = "batched"
    reuse: bool = True
    reader: LogitsReader | None = None

    def check(self, limits: Limits) -> None:
        """Raise UserError for what no model, or none of these limits, can write."""
        prompt = self.prompt
        if len(prompt) == 0:
            raise UserError("the prompt is empty: give at least one token")
        if len(prompt) >= limits.positions:
            raise UserError(
                f"prompt has {len(prompt)} tokens, context is {limits.positions}: "
                f"shorten the prompt to {limits.positions - 1} or load the model with a longer context"
            )
        if not 0 <= min(prompt) <= max(prompt) < limits.vocabulary:
            raise UserError(
                f"prompt has token ids {min(prompt)} to {max(prompt)}, the target's vocabulary is "
                f"{limits.vocabulary}: use the tokenizer of the target"
            )
        if not isinstance(self.max_new_tokens, Integral):
            raise UserError(f"max_new_tokens {self.max_new_tokens!r}: must be a whole number")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: must be at least 1")
        needed = min(len(prompt) + self.max_new_tokens, limits.positions)
        if limits.pool is not None and needed > limits.pool:
            fits = limits.pool - len(prompt)
            remedy = f"ask for at most {fits} new tokens" if fits > 0 else f"shorten the prompt to {limits.pool - 1}"
            raise UserError(
                f"prompt of {len(prompt)} tokens and max_new_tokens {self.max_new_tokens} take {needed} positions, the "
                f"cache has {limits.pool} for all texts: {remedy}, or load the model with a larger cache"
            )
        if self.verification not in VERIFICATIONS:
            raise UserError(f"verification {self.verification!r}: must be 'batched' or 'sequential'")


class Sequence:
    """A request under way. Made by `Engine.add`.

    Attributes:
        request: what was asked for.
        slot: of the models' caches; WAITING before it has one.
        tokens: prompt and emitted text. Not to be changed from outside.
        cached: leading tokens that the target's cache holds.
        begun: whether rounds have begun: it then has a policy, and its drafter knows of it.
        prompt_states: hidden states of the prompt, a piece for each step that read it, with the position of its
            first row; until rounds begin.
        reading_s: seconds of steps in which the drafter has read the prompt and not come to its end.
        wanted: tokens that the policy allowed in this round, whatever room there was.
        error: what ended the text, if it was an error.
        stats: what has happened so far; its finish_reason is "" while the text goes on.
    """

    def __init__(self, request: Request, positions: int, stats: GenerationStats | None = None) -> None:
        room = positions - len(request.prompt)
        self.request = request
        self.slot = WAITING
        self.tokens = list(request.prompt)
        self.cached = 0
        self._policy: DraftPolicy | None = None
        self.prompt_states: list[tuple[Features, int, int]] = []  # states, position of the first, how many
        self.reading_s = 0.0
        self.wanted = 0
        self.error: Exception | None = None
        self.stats = GenerationStats() if stats is None else stats
        self.stats.prompt_tokens = len(request.prompt)
        self.generator: torch.Generator = request.sampling.generator("target")
        fits = request.max_new_tokens <= room
        self.limit, self.limit_reason = (request.max_new_tokens, "length") if fits else (room, "context")
        self.controller = request.controller or FixedDraftLength(0 if request.drafter is None else 4)

    @property
    def reading(self) -> bool:
        """Whether the target has not read the whole prompt yet."""
        return len(self.tokens) == len(self.request.prompt)

    @property
    def positions(self) -> int:
        """That it takes at most: prompt and text."""
        return len(self.request.prompt) + self.limit

    @property
    def begun(self) -> bool:
        """Whether rounds have begun."""
        return self._policy is not None

    @property
    def policy(self) -> DraftPolicy:
        """How many tokens to draft now. RuntimeError before rounds have begun."""
        if self._policy is None:
            raise RuntimeError("the sequence has no policy before its first round")
        return self._policy

    def begin(self) -> None:
        """Rounds begin."""
        self._policy = self.controller.begin(len(self.request.prompt), self.limit)

    @property
    def finished(self) -> bool:
        """Whether its text has ended, in whatever way."""
        return self.stats.finish_reason != ""

    @property
    def remaining(self) -> int:
        """Tokens that may still be emitted."""
        return self.limit - self.stats.tokens

    def taken(self, block: list[Token]) -> list[Token]:
        """The part of a block that belongs to the text, which ends inside it at a stop; notes why it ends, if it does.

        The block is at most as long as what may still be emitted. Raises NotFinite for an id that logits did not give.
        """
        request, reason = self.request, ""
        if block[-1].id < 0:
            raise NotFinite(
                f"the target's logits after {len(self.tokens) + len(block) - 1} tokens are not finite: its weights are "
                "damaged, or its numbers too large for its data type"
            )
        for sent, token in enumerate(block, 1):
            watched = request.watcher is not None and request.watcher.push(token)
            if watched or token.id in request.stop_ids:
                block, reason = block[:sent], "stop"
                break
        else:
            if len(block) == self.remaining:
                reason = self.limit_reason
        self.tokens += [token.id for token in block]
        self.stats.tokens += len(block)
        self.stats.finish_reason = reason
        return block
