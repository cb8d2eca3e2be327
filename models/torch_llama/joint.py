"""How the rows of several sequences are dealt out to forwards of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from models.speculative.model import Rows


class Piece(NamedTuple):
    """Tokens first..end-1 of one `Rows`, computed in one forward; owner: which `Rows`."""

    owner: int
    rows: Rows
    first: int
    end: int

    @property
    def tokens(self) -> Sequence[int]:
        """Those of the piece."""
        return self.rows.tokens[self.first : self.end]

    @property
    def position(self) -> int:
        """Where its first row lies in the cache: a tree's rows follow those of it that are there."""
        _, tokens, position, parents, _ = self.rows
        return position + self.first + (len(parents) - len(tokens) if parents is not None else 0)


def passes(rows: Sequence[Rows], most: int, chunk: int, apart: bool) -> Iterator[list[Piece]]:
    """The forwards that compute rows of several sequences, in order.

    Sequences of up to `most` rows are all in the first one. Longer ones, which are read for their last row, are cut
    where chunks of positions end, and a forward takes as many of their rows as one chunk has.

    apart: whether a whole chunk has a forward of its own, so that its bits do not depend on what is beside it.
    """
    short = [Piece(i, each, 0, len(each.tokens)) for i, each in enumerate(rows) if len(each.tokens) <= most]
    long: list[Piece] = []
    for i, each in enumerate(rows):
        if len(each.tokens) > most:
            end = each.position + len(each.tokens)
            edges = [each.position, *range((each.position // chunk + 1) * chunk, end, chunk), end]
            long += [
                Piece(i, each, a - each.position, b - each.position) for a, b in zip(edges, edges[1:], strict=False)
            ]
    taken, count = short, 0
    for piece in long:
        size = piece.end - piece.first
        if taken and (count + size > chunk or (apart and chunk in (size, count))):
            yield taken
            taken, count = [], 0
        taken, count = [*taken, piece], count + size
    if taken:
        yield taken
