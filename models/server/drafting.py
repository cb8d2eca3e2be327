"""Who drafts for a request: a `Drafting` for each configuration that was asked for, which learns as long as it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress

from models.errors import UserError
from models.llm import LLM, Drafting
from models.options import AUTO, DRAFT_TOKENS
from models.speculative.control.policy import AutoDraftLength
from models.speculative.drafters.registry import NONE, spec_of, specs

Length = int | str


class Draftings:
    """What requests may choose from. Belongs to the engine's thread.

    Args:
        llm: with the models that draft.
        warn: told what a drafter has raised, once for each text that loses it.
    """

    def __init__(self, llm: LLM, warn: Callable[[Exception], None]) -> None:
        self._llm = llm
        self._warn = warn
        self._made: dict[tuple[str, Length], Drafting] = {}
        self.default = self.of(None, None)

    def of(self, drafter: str | None, length: Length | None) -> Drafting:
        """The configuration of this drafter and draft length, each by default the server's.

        length: "on" stands for a fixed one. Raises UserError for what this server cannot do.
        """
        options = self._llm.options
        name = drafter or options.drafter
        if length is None:
            length = options.num_draft_tokens if name != NONE else 0
        elif length == "on":
            length = options.num_draft_tokens if isinstance(options.num_draft_tokens, int) else DRAFT_TOKENS
            length = min(length, options.longest_draft)
        if name == NONE or length == 0:
            name, length = NONE, 0
        if (made := self._made.get((name, length))) is None:
            made = self._made[name, length] = self._make(name, length)
        return made

    @property
    def names(self) -> tuple[str, ...]:
        """Drafters that a request may ask for."""
        usable = []
        for spec in specs():
            with suppress(UserError):
                self.of(spec.name, None)
                usable.append(spec.name)
        return tuple(usable)

    def _make(self, name: str, length: Length) -> Drafting:
        llm = self._llm
        if name != NONE:
            self._check(name, length)
        drafting = llm.drafting(name, length, lost=self._warn)
        if drafting.drafter is None:
            return drafting
        controller = drafting.controller
        if isinstance(controller, AutoDraftLength) and self._made:
            known = self.default.controller
            if isinstance(known, AutoDraftLength):  # what forwards cost does not depend on who drafts
                controller = AutoDraftLength(controller.lengths, known.costs)
        return dataclasses.replace(drafting, controller=controller)

    def _check(self, name: str, length: Length) -> None:
        options, spec = self._llm.options, spec_of(name)
        if not options.drafts:
            raise UserError(f"drafter {name!r}: this server decodes plainly: start it without --drafter {NONE}")
        if "exit_layer" in spec.settings and self._llm.exit_layer is None and self._made:
            raise UserError(f"drafter {name!r}: its layers are not chosen: start the server with --drafter {name}")
        longest = options.longest_draft if options.fixed_rows else self._llm.target.model.limits.rows - 1
        if length != AUTO and int(length) > longest:
            raise UserError(
                f"num_draft_tokens {length}: this server verifies at most {longest} with equal bits: ask for fewer, or "
                f"start it with --num-draft-tokens {length}"
            )
        if spec.workload.tree and options.spec is not None and not options.spec.workload.tree and options.fixed_rows:
            raise UserError(f"drafter {name!r}: start the server with --drafter {name}, so that rows suffice for trees")
