"""Who may start, and who reads how much of its prompt in a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from models.errors import UserError
from models.speculative.drafters import HoldsBeginnings
from models.speculative.model import LanguageModel, Paged, Rows
from models.speculative.sequence import Sequence as TextSequence

PROMPT_ROWS = 512  # of prompts that a step reads beside texts that are being written


def release(sequence: TextSequence, slot: int) -> None:
    """Tell the drafter of a sequence that does not begin."""
    drafter = sequence.request.drafter
    if drafter is not None and isinstance(drafter, HoldsBeginnings):
        drafter.release(slot)


class Scheduler:
    """Sequences and the target's slots.

    They start in the order in which they came. Where the target's cache is a pool (`Paged`), a sequence starts when
    all positions that it may ever need are promised to it, so that none is ever stopped for another; what does not fit
    yet waits, and what came later waits behind it.

    Args:
        target: its limits say how many sequences have a slot.
        prompt_rows: tokens of prompts that a step reads at most while other texts are being written, so that these
            never wait longer for a token. The first prompt of a step in which none is written is read at once.
    """

    def __init__(self, target: LanguageModel, prompt_rows: int = PROMPT_ROWS) -> None:
        if prompt_rows < 1:
            raise UserError(f"prompt_rows {prompt_rows}: a step has to read at least 1 token of a prompt")
        self.running: list[TextSequence] = []
        self.waiting: deque[TextSequence] = deque()
        self._target = target
        self.prompt_rows = prompt_rows
        self._free = list(range(target.limits.slots))

    def admit(self, chosen: Collection[TextSequence] | None = None) -> list[TextSequence]:
        """Start those that wait (of the chosen ones) in their order, as far as there is room.

        Returns those that there never will be room for, as the pages turn out: each has its error, and has left.
        """
        refused = []
        for sequence in list(self.waiting):
            if chosen is not None and sequence not in chosen:
                continue
            try:
                if not self.start(sequence):
                    if self.running:
                        break
                    raise UserError(
                        f"{sequence.positions} positions are not free in the cache though no other text is under way: "
                        "ask for fewer new tokens, or load the model with a larger cache"
                    )
            except UserError as error:
                self.waiting.remove(sequence)
                sequence.error = error
                refused.append(sequence)
        return refused

    def start(self, sequence: TextSequence) -> bool:
        """Give a sequence that waits a slot, and its promised positions; False: there is no room now.

        Raises UserError where there never will be.
        """
        if not self._free:
            return False
        slot = self._free[0]
        if isinstance(self._target, Paged):
            reused = None
            try:
                reused = self._target.reserve(slot, self._known(sequence, slot), sequence.positions)
            finally:
                if reused is None:
                    release(sequence, slot)
            if reused is None:
                return False
            sequence.cached = sequence.stats.reused_tokens = reused
        self._free.pop(0)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.slot = slot
        return True

    @staticmethod
    def _known(sequence: TextSequence, slot: int) -> Sequence[int]:
        """The beginning of a sequence's prompt that the target need not read: the states of all that a drafter with
        taps does not hold are wanted."""
        request = sequence.request
        prompt, drafter = request.prompt if request.reuse else [], request.drafter
        if not prompt or drafter is None or not drafter.taps:
            return prompt
        held = drafter.hold(sequence, slot) if isinstance(drafter, HoldsBeginnings) else 0
        return prompt[: held + 1] if held else []

    def leave(self, sequence: TextSequence) -> None:
        """A sequence that was running has ended: its slot is free."""
        self.running.remove(sequence)
        self._target.free(sequence.slot)
        self._free.append(sequence.slot)

    def pieces(self, reading: Sequence[TextSequence], writing: int) -> list[tuple[TextSequence, Rows]]:
        """The pieces of prompts that a step reads beside so many texts that are being written."""
        pieces: list[tuple[TextSequence, Rows]] = []
        left = self.prompt_rows
        for sequence in reading:
            prompt, start = sequence.request.prompt, sequence.cached
            whole = not (writing or pieces)
            end = len(prompt) if whole else min(len(prompt), start + left)
            if end > start:
                pieces.append((sequence, Rows(sequence.slot, prompt[start:end], start, last=True)))
                left = max(0, left - (end - start))
        return pieces

    def no_room(self) -> UserError:
        """Why a text cannot start now."""
        if self._free:
            return UserError(
                f"the cache has no room beside {len(self.running)} texts that are not complete: finish or close one, "
                "ask for fewer new tokens, or load the model with a larger cache"
            )
        return UserError(
            f"all {len(self.running)} slots are taken by texts that are not complete: finish or close one, or "
            "load the model with more slots"
        )
