"""Who drafts for a text, with the models of a pair, and what has to be known before it can."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from loguru import logger

from models.errors import OptionError, UserError, in_words
from models.loaded import LoadedPair
from models.loading import OpenedPair
from models.options import AUTO
from models.speculative.control.costs import CostModel
from models.speculative.control.policy import AutoDraftLength, Controller, FixedDraftLength
from models.speculative.drafters import Drafter, PerSequence
from models.speculative.drafters.degrading import Degrading
from models.speculative.drafters.in_step import InStep
from models.speculative.drafters.registry import FORCED, NONE, DrafterSpec, Parts, spec_of
from models.speculative.generate import stream
from models.speculative.sequence import Request

if TYPE_CHECKING:
    from models.speculative.drafters.early_exit import ExitChoice

EXIT_TOKENS = 64  # that the target writes for the choice of an exit layer


@dataclass(frozen=True)
class Drafting:
    """Who drafts, and how much: one configuration, which learns as long as it is used. Made by `LLM.drafting`.

    Args:
        name: of the drafter.
        length: tokens drafted a round, or "auto".
        drafter: for the engine; None: plain decoding.
        controller: its policies.
        verification: "batched" or "sequential".
    """

    name: str
    length: int | str
    drafter: Drafter | None
    controller: Controller | None
    verification: str = "batched"


class DraftingPair(LoadedPair):
    """A loaded pair that knows who drafts in it, and how much.

    Attributes:
        exit: how the layer of early exit was chosen, where it was chosen by measurement.
        exit_s: seconds that the choice took.
    """

    def __init__(
        self,
        pair: OpenedPair,
        *,
        announce: Callable[..., None] | None = None,
        progress: Callable[[str, int, int, str], None] | None = None,
    ) -> None:
        """Load an opened pair; arguments as of `LoadedPair`."""
        super().__init__(pair, announce=announce, progress=progress)
        self.exit: ExitChoice | None = None
        self.exit_s = 0.0
        self._default: Drafting | None = None
        self._recorded: dict[tuple[int, ...], list[int]] = {}  # plain texts by prompt, for forced acceptance

    def drafting(
        self,
        drafter: str | None = None,
        num_draft_tokens: int | str | None = None,
        verification: str | None = None,
        *,
        lost: Callable[[Exception], None] | None = None,
    ) -> Drafting:
        """A configuration of who drafts how much, with the models that are loaded.

        Where the drafter raises, or proposes what cannot be verified, that text goes on plainly:
        `GenerationStats.drafting_failure` says why.

        Args:
            drafter: a name in `drafters.registry`; default: the loaded options'.
            num_draft_tokens: tokens drafted a round, or "auto"; default: the loaded options'.
            verification: "batched" or "sequential"; default: the loaded options'.
            lost: told what was raised, once for each text that loses its drafter; default: a warning in the log, and a
                UserError of a drafter that cannot draft for a text at all ends that text.

        Raises:
            UserError: a drafter that there is not, or that needs a model that is not loaded.
        """
        options = self.options
        name = drafter or options.drafter
        length = options.num_draft_tokens if num_draft_tokens is None else num_draft_tokens
        if name == NONE or length == 0 or not options.speculative:
            return Drafting(name, 0, None, FixedDraftLength(0))
        spec = spec_of(name)
        if spec.needs_draft_model and self.draft is None:
            raise UserError(f"drafter {name!r} needs a draft model, and none is loaded: load one with draft=...")
        if spec.needs_head and self.head is None:
            raise UserError(
                f"drafter {name!r} needs a draft head, and a draft model is loaded: load one with draft=..."
            )
        if name == "model" and self.head is not None:
            raise UserError("drafter 'model' needs a draft model, and a head is loaded: draft with 'head'")
        how = verification or options.verification
        refusals = (UserError,) if lost is None else ()
        guarded = Degrading(self._drafter(spec), lost or partial(warn_of, name), refusals)
        return Drafting(name, length, guarded, self.controller(length), how)

    def controller(self, num_draft_tokens: int | str) -> Controller:
        """Of a fixed draft length, or one that chooses ("auto") and learns in every text that it is used for."""
        if num_draft_tokens != AUTO:
            return FixedDraftLength(int(num_draft_tokens))
        if self.board:
            return AutoDraftLength(self.board.lengths, CostModel(self.board.computed_rows))
        return AutoDraftLength(range(self.options.longest_draft + 1), CostModel(self.target.model.computed_rows))

    def measure_costs(self, controller: AutoDraftLength, *, greedy: bool = True) -> None:
        """What forwards of one, some and all rows cost, for a controller to begin with; it interpolates."""
        longest = min(self.options.verify_rows, self.max_seq_len)
        if self.board:  # where other programs than plain decoding's are met, they are timed as they come
            longest = 1
        rows = {n for n in (1, 2, 4, 7, 11) if n < longest} | {longest}
        controller.costs.measure(self.target.model, rows, greedy=greedy)
        if self.target.model.limits.slots > 1 and not self.board:
            controller.costs.measure_together(self.target.model, greedy=greedy)

    @property
    def exit_layer(self) -> int | None:
        """Layers that early exit drafts with; None before they are chosen."""
        if self.exit:
            return self.exit.exit_layer
        layer = self.options.exit_layer
        return layer if isinstance(layer, int) else None

    def choose_exit(self, prompt: Sequence[int]) -> None:
        """Choose the layers of early exit by what the target itself writes after a prompt.

        Raises UserError for a prompt that leaves no room, and while another text is under way, whose cache it needs.
        """
        from models.speculative.drafters.early_exit import choose_exit
        from models.speculative.generate import generate

        if self.engine.running:
            raise OptionError(
                f"[exit_layer] {AUTO} is chosen while no other text is under way: finish those, or give a number"
            )
        began = time.perf_counter()
        model, options = self.target.model, self.options
        check_exit_choice(self.max_seq_len, prompt)
        room = self.max_seq_len - len(prompt)
        written = generate(model, None, prompt, max_new_tokens=min(EXIT_TOKENS, room))
        tokens = [*prompt, *(token.id for token in written)]
        longest = max(1, min(options.longest_draft, self.max_seq_len - 1))
        self.exit = choose_exit(model, tokens, len(prompt), range(1 if options.auto else longest, longest + 1))
        self.exit_s = time.perf_counter() - began

    def _drafting_for(self, speculate: bool | Drafting) -> Drafting:
        if isinstance(speculate, Drafting):
            return speculate
        if not isinstance(speculate, bool):
            raise UserError(f"speculate is {speculate!r}: give True, False or what llm.drafting(...) returns")
        if not speculate:
            return Drafting(NONE, 0, None, None)
        if self._default is None:
            self._default = self.drafting()
        return self._default

    def _drafter(self, spec: DrafterSpec) -> Drafter:
        def parts(sequence) -> Parts:
            request, board = sequence.request, self.board
            one_program = request.sampling.greedy and request.verification == "batched" and request.reader is None
            return Parts(
                target=self.target.model,
                draft=self.draft.model if self.draft else None,
                sampling=request.sampling,
                slot=sequence.slot,
                rounds=board.fused if board and one_program else None,
                confident=board is None,  # on a board probabilities would have to leave the device, step by step
                settings={
                    "tree_nodes": self.options.tree_nodes,
                    "exit_layer": self.exit_layer,
                    "force_acceptance": self.options.force_acceptance,
                    "recorded": self._recorded.get(tuple(request.prompt), []),
                    "prompt_tokens": len(request.prompt),
                },
            )

        if spec.drafter:
            return spec.drafter(parts)
        if self.draft is None or not spec.needs_draft_model:
            return PerSequence(lambda sequence: spec.make(parts(sequence)))
        taps = self.head.taps if self.head else ()
        return InStep(lambda sequence: spec.make(parts(sequence)), self.draft.model, taps)

    def _prepare(self, drafting: Drafting, request: Request) -> None:
        """What has to be known before a text begins: programs, the exit layer, costs."""
        if self.board:
            self.board.prepare_prompt(len(request.prompt), request.max_new_tokens)
        if drafting.drafter is None:
            return
        if "exit_layer" in spec_of(drafting.name).settings and self.exit_layer is None:
            self.choose_exit(request.prompt)
        if drafting.name == FORCED:
            self._record(request)
        controller = drafting.controller
        # Measuring overwrites the first slot's cache: while a text is under way its own rounds tell what they cost.
        if isinstance(controller, AutoDraftLength) and not controller.costs.known("verify") and not self.engine.running:
            self.measure_costs(controller, greedy=request.sampling.greedy)

    def _record(self, request: Request) -> None:
        """Write plainly what a forced draft is to repeat, if it is not known yet."""
        known = self._recorded.get(tuple(request.prompt), [])
        if len(known) < min(request.max_new_tokens, self.max_seq_len - len(request.prompt)):
            plain = Request(request.prompt, max_new_tokens=request.max_new_tokens)
            tokens = stream(self.engine, self.engine.add(plain))
            self._recorded[tuple(request.prompt)] = [token.id for token in tokens]


def warn_of(drafter: str, error: Exception) -> None:
    """Log that a drafter has failed in a text."""
    logger.warning(f"the drafter {drafter!r} failed, and this text goes on without it: {in_words(error)}")


def check_exit_choice(max_seq_len: int, prompt: Sequence[int]) -> None:
    """Raise UserError where the layers of early exit cannot be chosen by what follows a prompt."""
    if max_seq_len - len(prompt) < 2:
        raise OptionError(
            f"[exit_layer] {AUTO} has to see the target write two tokens after prompt 1, which leaves room for one: "
            "shorten it, raise [max_seq_len] or give a number of layers"
        )
