"""What a prompt is, and what is written after it: the pieces of a stream, or a whole text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from models.speculative.stats import GenerationStats

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
