"""Depths, levels and sights of trees, against walking up from each row."""

import random

import pytest

from models.speculative.stats import Round
from models.speculative.tree import tree_depths, tree_levels, tree_sights


def ancestors(parents, row) -> list[int]:
    found = []
    while (row := parents[row]) >= 0:
        found.append(row)
    return found


def test_a_tree_drawn_by_hand():
    parents = [-1, 0, 0, 2, 1]
    assert tree_depths(parents) == [0, 1, 1, 2, 2] and tree_levels(parents) == 3
    assert tree_sights(parents) == [0b1, 0b11, 0b101, 0b1101, 0b10011]


@pytest.mark.parametrize("seed", range(20))
def test_any_tree(seed):
    rng = random.Random(seed)
    parents = [rng.randrange(-1, row) for row in range(rng.randrange(1, 32))]
    above = [ancestors(parents, row) for row in range(len(parents))]
    assert tree_depths(parents) == [len(each) for each in above]
    assert tree_levels(parents) == 1 + max(len(each) for each in above)
    assert tree_sights(parents) == [sum(1 << i for i in (row, *each)) for row, each in enumerate(above)]


def test_no_rows_have_no_levels():
    assert tree_levels([]) == 0 and tree_depths([]) == tree_sights([]) == []


def test_a_round_is_as_deep_as_its_longest_chain():
    assert Round(5, 0, 1).depth == 5 and Round(0, 0, 1).depth == 0
    assert Round(5, 0, 1, parents=(-1, 0, -1, 2, 3)).depth == 3 and Round(2, 0, 1, parents=(-1, -1)).depth == 1
