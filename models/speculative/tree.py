"""The shape of a tree of tokens, from its parents alone.

parents[i] is the row that row i follows, always an earlier one, or -1. In a forward row 0 alone has none; in a draft
every token that follows the text has none.
"""

from collections.abc import Sequence


def tree_depths(parents: Sequence[int]) -> list[int]:
    """How many ancestors each row has."""
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return depths


def tree_levels(parents: Sequence[int]) -> int:
    """Rows of the longest path from a row without a parent downwards; 0 for no rows."""
    return 1 + max(tree_depths(parents), default=-1)


def tree_sights(parents: Sequence[int]) -> list[int]:
    """What each row sees of the tree, its ancestors and itself: a number with a bit for each of these rows."""
    sights: list[int] = []
    for row, parent in enumerate(parents):
        sights.append((sights[parent] if parent >= 0 else 0) | 1 << row)
    return sights
