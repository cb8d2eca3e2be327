"""One text as a generator of tokens."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence

from models.speculative.control.policy import Controller
from models.speculative.drafters import OneText, SequenceDrafter
from models.speculative.engine import Engine
from models.speculative.model import LanguageModel, OneSlot, SequenceModel
from models.speculative.sampling import SamplingParams
from models.speculative.sequence import Request, Token, Watcher
from models.speculative.sequence import Sequence as TextSequence
from models.speculative.stats import GenerationStats


def generate(
    target: LanguageModel | SequenceModel,
    drafter: SequenceDrafter | None,
    prompt: Sequence[int],
    *,
    sampling: SamplingParams | None = None,
    controller: Controller | None = None,
    max_new_tokens: int = 128,
    stop_ids: Collection[int] = (),
    watcher: Watcher | None = None,
    verification: str = "batched",
    stats: GenerationStats | None = None,
) -> Generator[Token, None, None]:
    """Yield the tokens that follow `prompt`, distributed as the target alone would have written them.

    How: see `engine.Engine`. Prompt and text together never exceed the target's positions (finish reason "context";
    "length" if max_new_tokens is no larger). `stats`, a fresh one, is filled while tokens come; time the consumer
    holds a token is not counted.

    Args:
        target: a model whose first slot is free, or a model of one sequence.
        drafter: proposes tokens for this text; None: every token is decoded plainly.
        prompt: token ids.
        sampling: default greedy, which moves only ids.
        controller, max_new_tokens, stop_ids, watcher, verification: as of `sequence.Request`.
        stats: a fresh one.

    Raises:
        UserError: at the call, for what `Request.check` refuses.
    """
    model = target if isinstance(target, LanguageModel) else OneSlot(target)
    engine = Engine(model, clock=time.perf_counter)
    request = Request(
        list(prompt),
        sampling or SamplingParams(),
        max_new_tokens,
        frozenset(stop_ids),
        watcher,
        None if drafter is None else OneText(drafter),
        controller,
        verification,
    )
    stats = GenerationStats() if stats is None else stats
    return stream(engine, engine.add(request, stats))


def stream(engine: Engine, sequence: TextSequence) -> Generator[Token, None, None]:
    """Yield a sequence's tokens one by one. Its `stats` count those that were handed out, also if the consumer leaves.

    Other sequences of the engine stay where they are meanwhile.
    """
    stats = sequence.stats
    left = 0  # tokens of the last step that are still to be handed out
    try:
        while not sequence.finished:
            tokens = engine.advance(sequence)
            reason, stats.finish_reason = stats.finish_reason, ""
            left = len(tokens)
            stats.tokens -= left
            for token in tokens:
                left -= 1
                stats.tokens += 1
                if not left:
                    stats.finish_reason = reason
                yield token
    finally:
        if left:
            stats.rounds[-1].emitted -= left
            stats.rounds[-1].cut = True
        engine.abort(sequence)
