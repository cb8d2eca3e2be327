"""What a prompt is, and what is written after it: the pieces of a stream, or whole texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from models.errors import NotFinite, in_words
from models.speculative.engine import Engine
from models.speculative.sequence import Request
from models.speculative.stats import GenerationStats
from models.speculative.text import TextStream

# A text, token ids, or the messages of a conversation.
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


class Piece(NamedTuple):
    """A token of a stream.

    text: what has become certain with it; "" inside a character, and where a stop string may have begun.
    id, origin: as of `sequence.Token`. finish_reason: "" but for the last one, whose text is all that was left.
    """

    text: str
    id: int
    origin: str
    finish_reason: str = ""


@dataclass(frozen=True)
class Completion:
    """A text that is complete, or what there is of it.

    Args:
        text: without special tokens, and without the stop string that ended it.
        token_ids: all that were emitted, a stop token included.
        finish_reason: "stop", "length" (max_new_tokens) or "context" (no position is left); "interrupted" in the
            `completions` of an error.
        stats: counts and times.
        error: in words, what ended it; "": no error of its own.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: GenerationStats
    error: str = ""


def write_texts(
    engine: Engine,
    asked: Sequence[tuple[Request, TextStream]],
    all_stats: Sequence[GenerationStats],
    explained: Callable[[NotFinite, Sequence[int], int], NotFinite],
) -> list[Completion]:
    """Write texts side by side, to their ends.

    Args:
        engine: takes the steps.
        asked: requests with their texts.
        all_stats: a fresh one for each, to fill.
        explained: the error to show for one of numbers that are not finite, of the prompt and the slot it came in.

    Raises:
        Exception: what ended a text, once all others are complete, with the attribute `completions`.
    """
    sequences = [engine.add(request, stats) for (request, _), stats in zip(asked, all_stats, strict=True)]
    left = set(sequences)
    raised: BaseException | None = None
    try:
        while left:
            left.difference_update(each for each, _ in engine.step(left) if each.finished)
    except BaseException as error:  # no text's own: an interruption, or a slot that there is not
        raised = error
    for sequence in left:
        engine.abort(sequence)
    for sequence in sequences:
        if isinstance(sequence.error, NotFinite):  # all slots of these texts are free by now
            sequence.error = explained(sequence.error, sequence.request.prompt, sequence.slot)
        raised = raised or sequence.error
    written = [
        Completion(
            text.finish(),
            each.tokens[len(each.request.prompt) :],
            each.stats.finish_reason,
            each.stats,
            in_words(each.error) if each.error else "",
        )
        for each, (_, text) in zip(sequences, asked, strict=True)
    ]
    if raised is not None:
        raise with_completions(raised, written)
    return written


def with_completions(error: BaseException, written: list[Completion]) -> BaseException:
    """The error, with what was written until it came."""
    error.completions = written  # type: ignore[attr-defined]
    return error
