"""Finished texts, replayed against plain decoding while the engine has nothing else to do."""

from __future__ import annotations

from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from loguru import logger

from models.audit import CONSISTENT, DIFFERENT, IDENTICAL, NEAR_TIE, Auditor, Steps, TextAudit, describe
from models.server.jobs import Choice

if TYPE_CHECKING:
    from models.llm import LLM
    from models.server.metrics import Metrics
    from models.speculative.sequence import Sequence

DIVERGED, SKIPPED, FAILED = "diverged", "skipped", "failed"
VERDICTS = (IDENTICAL, NEAR_TIE, CONSISTENT, DIVERGED, SKIPPED, FAILED)
WAITING = 64  # texts that may wait to be replayed; the oldest are left out for newer ones
ATTEMPTS = 8  # of a replay, each of which a request has ended


class Candidate(NamedTuple):
    """A text that has ended, as a replay needs it.

    name: of its request. drafter: who drafted for it. finish_reason: as of `GenerationStats`. attempts: of replays.
    """

    name: str
    choice: Choice
    drafter: str
    tokens: list[int]
    finish_reason: str
    attempts: int = 0


class Audits:
    """Replays one in so many texts. Belongs to the engine's thread.

    A replay is taken forward by forward, and only while no request is under way. A request ends it: it begins again
    when there is time. Of sampled texts each token's place in the target's distribution is counted.

    Args:
        llm: the models that wrote the texts.
        every: one in so many texts.
        metrics: told what was found.
    """

    def __init__(self, llm: LLM, every: int, metrics: Metrics) -> None:
        self._every, self._metrics = every, metrics
        self._auditor = Auditor(llm, executor=ThreadPoolExecutor(1, "audit"))
        self._seen = 0
        self._waiting: deque[Candidate] = deque()
        self._steps: Steps[TextAudit] | None = None  # of the first one that waits
        self._counts: Counter[str] = Counter(dict.fromkeys(VERDICTS, 0))
        metrics.audits = self._counts

    def ended(self, name: str, choice: Choice, drafter: str, sequence: Sequence) -> None:
        """A text has ended with all that it was to have. name, drafter: as of `Candidate`."""
        self._seen += 1
        if self._seen % self._every:
            return
        if len(self._waiting) == WAITING:
            self._waiting.popleft()
            self._counts[SKIPPED] += 1
        tokens = sequence.tokens[len(sequence.request.prompt) :]
        self._waiting.append(Candidate(name, choice, drafter, tokens, sequence.stats.finish_reason))

    def step(self) -> float | None:
        """Take a replay one forward further. Returns for how many seconds there is nothing to do; None: no text waits.

        No text may be under way in the engine.
        """
        if not self._waiting:
            return None
        try:
            if self._steps is None:
                self._steps = self._begun(self._waiting[0])
            return next(self._steps)
        except StopIteration as end:
            self._found(self._waiting[0], end.value)
        except Exception as error:  # of the replay, not of the text
            self._counts[FAILED] += 1
            logger.warning(f"audit of {_named(self._waiting[0])}: {type(error).__name__}: {error}")
        self._steps = None
        self._waiting.popleft()
        return 0.0

    def give_way(self) -> None:
        """A request comes: its slots must be free."""
        if self._steps is None:
            return
        self._steps.close()
        self._steps = None
        first = self._waiting.popleft()
        if first.attempts + 1 < ATTEMPTS:
            self._waiting.appendleft(first._replace(attempts=first.attempts + 1))
        else:
            self._counts[SKIPPED] += 1

    def _begun(self, text: Candidate) -> Steps[TextAudit]:
        choice = text.choice
        return self._auditor.steps(
            choice.prompt,
            text.tokens,
            choice.sampling,
            finish_reason=text.finish_reason,
            stop=choice.stop,
            stop_ids=None if choice.stop_ids is None else list(choice.stop_ids),
        )

    def _found(self, text: Candidate, audit: TextAudit) -> None:
        self._counts[DIVERGED if audit.verdict == DIFFERENT else audit.verdict] += 1
        self._metrics.audited_tokens += audit.tokens
        for transform in audit.uniforms:
            self._metrics.transforms.observe(transform)
        if audit.verdict == DIFFERENT:
            first = next(each for each in audit.divergences if not each.near_tie)
            logger.warning(f"audit of {_named(text)}: {describe(first, audit.greedy)}")


def _named(text: Candidate) -> str:
    return f"{text.name}, choice {text.choice.index}, drafter {text.drafter}"
