"""How many tokens to draft now."""

from typing import Protocol

from models.errors import UserError
from models.speculative.stats import Round

MAX_DRAFT_LENGTH = 31  # with the token before them, drafted tokens fill one tile of 32 rows


class Controller(Protocol):
    """Asked before every round, told about every round. It may learn from rounds and times, never from tokens ahead."""

    def draft_length(self) -> int:
        """Tokens to draft in the next round; 0 decodes one token plainly."""

    def update(self, round: Round) -> None:
        """A round has been decided; its tokens are about to be emitted, so that host_s is not known yet."""


class FixedDraftLength:
    """The same number in every round, 0 (never draft) to 31."""

    def __init__(self, k: int = 4) -> None:
        if not 0 <= k <= MAX_DRAFT_LENGTH:
            raise UserError(f"draft length {k}: must be between 0 (no speculation) and {MAX_DRAFT_LENGTH}")
        self.k = k

    def draft_length(self) -> int:
        return self.k

    def update(self, round: Round) -> None:
        pass
