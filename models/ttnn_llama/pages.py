"""Which pages of a paged KV cache each sequence has. Importable where ttnn is not installed."""

from __future__ import annotations

from models.errors import UserError
from models.ttnn_llama.shapes import KV_BLOCK, pages_of


class Pages:
    """Pages of 128 positions, handed out as texts grow and taken back when they end. A page has one owner at most.

    Args:
        slots: sequences.
        positions: each of them may have.
        count: pages there are; default: enough for every slot to be full.
    """

    def __init__(self, slots: int, positions: int, count: int | None = None) -> None:
        self.positions = positions
        self.count = slots * pages_of(positions) if count is None else count
        self._owned: list[list[int]] = [[] for _ in range(slots)]
        self._free = list(range(self.count))

    @property
    def free_count(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def of(self, slot: int) -> tuple[int, ...]:
        """The pages of a slot, in the order of its positions."""
        return tuple(self._owned[slot])

    def reserve(self, slot: int, positions: int) -> None:
        """Let a slot have pages for positions 0 .. positions-1; those that it has stay.

        Raises UserError where too few are free: it then has what it had.
        """
        owned = self._owned[slot]
        more = pages_of(positions) - len(owned)
        if more > len(self._free):
            raise UserError(
                f"{positions} positions of slot {slot} need {more} more pages of {KV_BLOCK}, {len(self._free)} of "
                f"{self.count} are free: {(len(owned) + len(self._free)) * KV_BLOCK} positions would fit; end another "
                "text, or load the model with a shorter context or fewer slots"
            )
        for _ in range(more):
            owned.append(self._free.pop(0))

    def release(self, slot: int) -> None:
        """Take back all pages of a slot."""
        self._free += self._owned[slot]
        self._owned[slot] = []
