"""The table of drafters: what each name of --drafter makes of a session's models, for one generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from models.speculative.drafters import Drafter
from models.speculative.drafters.combined import Combined
from models.speculative.drafters.early_exit import EarlyExit
from models.speculative.drafters.fused import FusedDrafter
from models.speculative.drafters.model import ModelDrafter
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.drafters.tree import TreeDrafter

if TYPE_CHECKING:
    from demo.session import Session


def _model(session: Session) -> Drafter:
    if session.fused:
        return FusedDrafter(session.board.fused, session.draft.model)
    # On a board probabilities would have to leave the device, step by step.
    return ModelDrafter(session.draft.model, session.sampling, confident=session.board is None)


def _early_exit(session: Session) -> Drafter:
    target, layer = session.target.model, session.exit_layer
    drafter = EarlyExit(target, layer, session.sampling, confident=session.board is None)
    return FusedDrafter(session.board.fused, drafter.model, drafter) if session.fused else drafter


DRAFTING: dict[str, Callable[[Session], Drafter | None]] = {
    "model": _model,
    "prompt-lookup": lambda session: PromptLookup(),
    "combined": lambda session: Combined(PromptLookup(), _model(session)),
    "tree": lambda session: TreeDrafter(session.draft.model, session.sampling, session.settings.tree_nodes),
    "early-exit": _early_exit,
    "none": lambda session: None,
}
