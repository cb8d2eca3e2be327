"""Which pages of a paged KV cache each sequence has. Importable where ttnn is not installed.

Pages that are full of a prompt's tokens can be found by what they hold: the hash of these tokens, chained to the hash
of those before. A sequence that begins with the same tokens shares them, also after their owners have ended: such pages
stay until the space is needed, those unused for longest go first. Nobody writes into a page that others own.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, deque
from collections.abc import Sequence

from models.errors import UserError
from models.ttnn_llama.shapes import KV_BLOCK, pages_of


class Pages:
    """Pages of 128 positions, handed out as texts grow and taken back when they end.

    Args:
        slots: sequences.
        positions: each of them may have.
        count: pages there are; default: enough for every slot to be full.
    """

    def __init__(self, slots: int, positions: int, count: int | None = None) -> None:
        self.positions = positions
        self.count = slots * pages_of(positions) if count is None else count
        self._owned: list[list[int]] = [[] for _ in range(slots)]
        # Of each slot: the prompt as far as it is known to be in its pages, and the digests of the pages full of it.
        self._known: list[list[int]] = [[] for _ in range(slots)]
        self._digests: list[list[bytes]] = [[] for _ in range(slots)]
        self._free = deque(range(self.count))
        self._kept: dict[int, None] = {}  # nobody's, but found by their tokens; those left first come first
        self._others: Counter[int] = Counter()  # how many have a page beside its first owner
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def free_count(self) -> int:
        """Pages that nobody has."""
        return len(self._free) + len(self._kept)

    def of(self, slot: int) -> tuple[int, ...]:
        """The pages of a slot, in the order of its positions."""
        return tuple(self._owned[slot])

    def promise(self, slot: int, tokens: Sequence[int], positions: int) -> int | None:
        """Give a slot that has ended all pages for positions 0 .. positions-1 of a text that begins with these tokens.

        Returns how many of the tokens they hold already, in whole pages and at most all but one; None where too few
        pages are free now. Raises UserError where there never are enough.
        """
        needed = pages_of(positions)
        if needed > self.count:
            raise UserError(
                f"{positions} positions need {needed} pages of {KV_BLOCK}, there are {self.count}: ask for fewer new "
                f"tokens, shorten the prompt to fit {self.count * KV_BLOCK} positions, or raise --pool-size"
            )
        self.release(slot)
        shared = self._found(tokens)
        if needed - len(shared) > self.free_count - sum(page in self._kept for page in shared):
            return None
        for page in shared:
            if page in self._kept:
                del self._kept[page]
            else:
                self._others[page] += 1
        self._owned[slot] = [*shared, *(self._take() for _ in range(needed - len(shared)))]
        self._known[slot] = list(tokens[: len(shared) * KV_BLOCK])
        self._digests[slot] = [self._digest_of[page] for page in shared]
        return len(self._known[slot])

    def reserve(self, slot: int, positions: int) -> None:
        """Let a slot have pages for positions 0 .. positions-1; those that it has stay.

        Raises UserError where too few are free: it then has what it had.
        """
        owned = self._owned[slot]
        more = pages_of(positions) - len(owned)
        if more > self.free_count:
            raise UserError(
                f"{positions} positions of slot {slot} need {more} more pages of {KV_BLOCK}, {self.free_count} of "
                f"{self.count} are free: {(len(owned) + self.free_count) * KV_BLOCK} positions would fit; end another "
                "text, or load the model with a shorter context or fewer slots"
            )
        for _ in range(more):
            owned.append(self._take())

    def write(self, slot: int, start: int, end: int) -> None:
        """Let a slot have pages for positions start .. end-1, to be written by it: nobody else has or finds them.

        Where a page that others have is to be written from its begin on, another one takes its place. Raises UserError
        where too few are free, ValueError for positions in the middle of a page that others have.
        """
        self.reserve(slot, end)
        first = start // KV_BLOCK
        owned, known = self._owned[slot], self._known[slot]
        if first < len(self._digests[slot]):
            if start % KV_BLOCK and self._others[owned[first]]:
                raise ValueError(
                    f"position {start} of slot {slot} lies in page {owned[first]}, which another text has too: go on "
                    f"from position {len(known)}, or read the prompt anew from position 0"
                )
            theirs = [i for i in range(first, len(self._digests[slot])) if self._others[owned[i]]]
            if len(theirs) > self.free_count:
                raise UserError(
                    f"slot {slot} needs {len(theirs)} pages in place of those that others have, {self.free_count} of "
                    f"{self.count} are free: end another text, or raise --pool-size"
                )
            for i in range(first, len(self._digests[slot])):
                if self._others[owned[i]]:
                    self._others[owned[i]] -= 1
                    owned[i] = self._take()
                else:
                    self._forget(owned[i])
            del self._digests[slot][first:]
        del known[start:]

    def note(self, slot: int, position: int, tokens: Sequence[int]) -> None:
        """A piece of a slot's prompt has been written at a position, by what reads prompts: it may be shared."""
        known, digests = self._known[slot], self._digests[slot]
        if position != len(known):
            return
        known.extend(tokens)
        while (full := len(digests)) < len(known) // KV_BLOCK:
            digest = _digest(digests[-1] if full else b"", known[full * KV_BLOCK : (full + 1) * KV_BLOCK])
            digests.append(digest)
            page = self._owned[slot][full]
            if self._page_of.setdefault(digest, page) == page:
                self._digest_of[page] = digest

    def release(self, slot: int) -> None:
        """Take back all pages of a slot; those that can be found stay as they are until they are needed."""
        for page in reversed(self._owned[slot]):  # of a text the end goes before the beginning
            if self._others[page]:
                self._others[page] -= 1
            elif page in self._digest_of:
                self._kept[page] = None
            else:
                self._free.append(page)
        self._owned[slot], self._known[slot], self._digests[slot] = [], [], []

    def _found(self, tokens: Sequence[int]) -> list[int]:
        """The pages that hold the beginning of a text, all but its last token."""
        found: list[int] = []
        digest = b""
        for start in range(0, len(tokens) - KV_BLOCK, KV_BLOCK):
            digest = _digest(digest, tokens[start : start + KV_BLOCK])
            if digest not in self._page_of:
                break
            found.append(self._page_of[digest])
        return found

    def _take(self) -> int:
        """A page that nobody has: an empty one, else the one that was left first."""
        if self._free:
            return self._free.popleft()
        page = next(iter(self._kept))
        del self._kept[page]
        self._forget(page)
        return page

    def _forget(self, page: int) -> None:
        """Nobody finds a page any more."""
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]


def _digest(before: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=16, key=before).digest()
