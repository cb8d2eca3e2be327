"""A choice while the engine writes it: what it has got, and what of it is to be handed out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.server.jobs import OPENAI_REASONS, Choice, Delta, Job, Summary, Written

if TYPE_CHECKING:
    from models.llm import Drafting
    from models.server.scores import Scorer
    from models.speculative.engine import Emission
    from models.speculative.sequence import Sequence
    from models.speculative.text import TextStream


class Text:
    """A choice that the engine writes. Belongs to the engine's thread."""

    def __init__(self, job: Job, choice: Choice, text: TextStream, scorer: Scorer | None, drafting: Drafting) -> None:
        self.job, self.choice, self.drafting = job, choice, drafting
        self.text, self.scorer = text, scorer
        self.written: list[Written] = []  # and not handed out
        self.first = self.last = 0.0  # when it got its first token, and its last one
        self.rounds = self.drafted = self.accepted = 0

    def take(self, emission: Emission, now: float) -> int:
        """Note what a step has added; returns how many tokens."""
        tokens, ended = emission.tokens, emission.sequence.stats.finish_reason
        scores = self.scorer.take([token.id for token in tokens]) if self.scorer else [None] * len(tokens)
        last = len(tokens) - 1 if ended else -1
        for i, (token, score) in enumerate(zip(tokens, scores, strict=True)):
            text = self.text.finish() if i == last else self.text.take()
            self.written.append(Written(text, token.id, token.origin, score))
        self.first = self.first or now
        self.last = now
        return len(tokens)

    def delta(self, sequence: Sequence) -> Delta | None:
        """What is to be handed out now."""
        reason = OPENAI_REASONS.get(sequence.stats.finish_reason, "")
        if not reason and not (self.job.stream and self.written):
            return None
        written, self.written = self.written, []
        counts = self.rounds, self.drafted, self.accepted
        return Delta(self.choice.index, written, counts, reason, self._summary(sequence) if reason else None)

    def _summary(self, sequence: Sequence) -> Summary:
        waited = max(self.first - sequence.stats.ttft_s - self.job.arrived, 0.0)
        decode_s = self.last - self.first
        name, length = self.drafting.name, self.drafting.length
        return Summary(sequence.stats, waited, decode_s, name, length, sequence.wanted)
