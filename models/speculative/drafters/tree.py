"""Drafting a tree with a smaller model: several ways on where it is unsure, in one verification."""

from collections.abc import Generator
from typing import cast

import torch
from torch import Tensor

from models.errors import UserError
from models.speculative.acceptance import sample
from models.speculative.drafters import MAX_DRAFT_LENGTH, Draft, Limit
from models.speculative.drafters.in_step import Answer, Ask, Steps
from models.speculative.drafters.model import ModelDrafter
from models.speculative.model import TreeModel
from models.speculative.sampling import SamplingParams

WIDTH = 8  # children that a token may have
FRONTIER = 4  # tokens of a level that may have children; more give no more accepted tokens (embedded pair)
# Sampling: how often draft and target agree so well that a first child is accepted whatever it is. Without it siblings
# are overrated: trees of 6 tokens then gave less than chains of 4 (embedded pair, temperature 0.8). What it is between
# 0.2 and 0.6 makes little difference.
AGREEMENT = 0.4


class TreeDrafter(ModelDrafter):
    """A model that drafts trees of at most `nodes` tokens; limit("tree") bounds their levels, limit.rows too
    their tokens.

    A tree grows level by level, each by one forward of the draft over the tokens that are worth it. A token's path
    probability is the chance, as far as the draft knows, that the text gets there.

    Greedy: the path probability is that of the token and all before it. The tree is the one of the greatest sum of
    them, as in EAGLE-2 (Li et al. 2024): of all that was looked at the likeliest `nodes` tokens stay, and no level is
    begun that could not add to them.

    Sampling: children are drawn without replacement, and how many a token has is decided by distributions alone,
    before any of them is drawn. Places for children are opened where their expected path probability passes a
    threshold, which moves from round to round so that trees just fill; the last level takes what is left.

    Tokens come as the chain of first children from the text on, then the others, so that the likeliest rows of a
    verification lie where those of a chain would.

    Raises UserError for a number of tokens that is not between 1 and 31.
    """

    source = "tree"
    model: TreeModel

    def __init__(self, model: TreeModel, sampling: SamplingParams, nodes: int) -> None:
        if not 1 <= nodes <= MAX_DRAFT_LENGTH:
            raise UserError(f"a tree of {nodes} tokens: must be between 1 and {MAX_DRAFT_LENGTH}")
        super().__init__(model, sampling)
        self.nodes = nodes
        self._most = nodes  # of this round
        self._fed: list[int] = []  # parent of each of the tree's rows in the model's cache, from the text's last token
        self._row: dict[tuple[int, int], int] = {}  # row of a parent and a token -> row of the token
        self._threshold = 0.5 / nodes

    def _steps(self, tokens: list[int], limit: Limit, company: bool) -> Steps:
        """Draft a tree as deep as allowed and as the model's own context has room for, after catching up."""
        depth = min(limit(self.source), self.model.max_seq_len - len(tokens) + 1)  # the last level is not written
        self._most = min(self.nodes, limit.rows)
        if min(depth, self._most) < 1 or self._broken:
            return Draft([])
        self._keep_path(tokens)
        prefill_s = yield from self._reading(tokens, company)
        logits = cast("Tensor", (yield Ask(tokens[self.cached :], self.cached)))
        self.cached, self._fed = len(tokens), [-1]
        if not self._usable(logits):
            return Draft([], None, prefill_s, source=self.source)
        grow = self._likeliest if self.sampling.greedy else self._drawn
        tree = yield from grow(logits, depth, limit)
        return tree.draft(prefill_s)

    def _answer(self, ask: Ask) -> Answer:
        if ask.parents is None:
            return super()._answer(ask)
        return self.model.forward(ask.tokens, ask.position, ask.parents)

    def observe(self, accepted: int) -> None:
        """Nothing to learn: the text itself says which path was kept."""

    # ------------------------------------------------------------------------------------------- the model's cache
    def _keep_path(self, tokens: list[int]) -> None:
        """Make those rows of the last tree the sequence that the text went on with, but for its last token."""
        rows, row = [0], 0
        for token in tokens[self.cached : -1]:
            row = self._row.get((row, token), 0)
            if not row:
                break
            rows.append(row)
        if len(rows) > 1:
            self.cached += self.model.keep(self.cached - 1, rows) - 1
        self._row.clear()

    @property
    def _room(self) -> int:
        """Tokens that the next level may feed."""
        return min(FRONTIER, self.model.max_rows - len(self._fed))

    def _feed(self, parents: list[int], tokens: list[int]) -> "Generator[Ask, Answer, tuple[range, Tensor]]":
        """(rows of these tokens, logits [n, V] after each). parents: the rows they follow."""
        rows = range(len(self._fed), len(self._fed) + len(tokens))
        for row, parent, token in zip(rows, parents, tokens, strict=True):
            self._row[parent, token] = row
        self._fed += parents
        logits = yield Ask(tokens, self.cached - 1, parents=list(self._fed))
        return rows, cast("Tensor", logits)

    # --------------------------------------------------------------------------------------------------- greedy
    def _likeliest(self, logits: Tensor, depth: int, limit: Limit) -> "Generator[Ask, Answer, _Tree]":
        nodes, width = self._most, min(WIDTH, self._most, logits.shape[-1])
        # (-path probability, number, token, number of the parent): in order, parents come before their children.
        pool: list[tuple[float, int, int, int]] = []
        frontier, row_of = [(-1.0, -1, 0, 0)], {-1: 0}
        number = level = 0
        while True:
            level += 1
            chances, ids = torch.softmax(logits, -1, dtype=torch.float32).topk(width)
            begin, weakest = number, pool[-1][0] if len(pool) == nodes else 0.0
            for node, node_chances, node_ids in zip(frontier, chances.tolist(), self._ids(ids).tolist(), strict=True):
                above, parent = node[:2]
                for chance, token in zip(node_chances, node_ids, strict=True):
                    if above * chance >= weakest:
                        break
                    pool.append((above * chance, number, token, parent))
                    number += 1
            pool.sort()
            del pool[nodes:]
            # No child of the last one of a full pool could enter it.
            frontier = [node for node in pool[: nodes - 1] if node[1] >= begin][: self._room]
            if level == depth or not frontier or (limit.priced and not self._level_pays(frontier, pool, limit)):
                break
            rows, logits = yield from self._feed([row_of[node[3]] for node in frontier], [node[2] for node in frontier])
            for row, node in zip(rows, frontier, strict=True):
                row_of[node[1]] = row
            if not self._usable(logits):
                break
        if limit.priced:
            unpaid = (i for i in range(1, len(pool)) if not limit.pays(self.source, -pool[i][0], 0, i + 2))
            del pool[next(unpaid, nodes) :]
        index = {node[1]: i for i, node in enumerate(pool)}
        return _Tree([node[2] for node in pool], [index.get(node[3], -1) for node in pool], [-node[0] for node in pool])

    def _level_pays(self, frontier: list[tuple], pool: list[tuple], limit: Limit) -> bool:
        """Whether to feed these tokens: at most their path probabilities are added, less those that leave a full
        pool."""
        leaving = [0.0] * (self._most - len(pool)) + [node[0] for node in reversed(pool)]
        gain = sum(max(0.0, leaves - node[0]) for node, leaves in zip(frontier, leaving, strict=False))
        return limit.pays(self.source, gain, 1, 1 + min(self._most, len(pool) + 1))

    # ------------------------------------------------------------------------------------------------- sampling
    def _drawn(self, logits: Tensor, depth: int, limit: Limit) -> "Generator[Ask, Answer, _Tree]":
        threshold = self._threshold
        tree = _Tree([], [], [])
        frontier, row_of = [-1], {-1: 0}
        level = passed = 0  # places opened that are above the threshold
        unpaid = False
        while True:
            level += 1
            last = level == depth or not self._room
            probs = self._spread(self._drawn_from(logits))
            places = _places(probs, [tree.path_probs[node] if node >= 0 else 1.0 for node in frontier])
            count, paid = self._open(places, len(tree.tokens), last, limit)
            unpaid |= not paid
            new = tree.draw(probs, frontier, [i for _, i in places[:count]], self._generator)
            passed += sum(path_prob >= threshold for path_prob, _ in places[:count])
            frontier = [] if last else sorted(new, key=lambda node: -tree.path_probs[node])[: self._room]
            left = self._most - len(tree.tokens)
            if not left or not frontier:
                break
            gain = sum(tree.path_probs[node] for node in frontier[:left])
            if limit.priced and not limit.pays(self.source, gain, 1, len(tree.tokens) + 2):
                unpaid = True
                break
            parents = [tree.parents[node] for node in frontier]
            tokens = [tree.tokens[node] for node in frontier]
            rows, logits = yield from self._feed([row_of[node] for node in parents], tokens)
            row_of |= zip(frontier, rows, strict=True)
            if not self._usable(logits):
                break
        left_out = [path_prob for path_prob, _ in places[count:]] + [tree.path_probs[node] for node in frontier]
        if not left and max(left_out, default=0.0) >= threshold:
            self._threshold = min(1.0, 1.25 * threshold)
        elif passed < self._most and not unpaid:
            self._threshold = max(0.01 / self._most, 0.8 * threshold)
        return tree

    def _open(self, places: list[tuple[float, int]], size: int, last: bool, limit: Limit) -> tuple[int, bool]:
        """(how many of these places to open in a tree that has `size` tokens, False if a further one did not pay)."""
        places = places[: self._most - size]
        for count, (path_prob, _) in enumerate(places):
            if path_prob < self._threshold and count and not last:
                return count, True
            if limit.priced and size + count and not limit.pays(self.source, path_prob, 0, size + count + 2):
                return count, False
        return len(places), True


class _Tree:
    """Tokens by number, parents first: each with its parent (-1: the text's last token), its path probability, and what
    distribution [V] it was drawn from if it was."""

    def __init__(self, tokens: list[int], parents: list[int], path_probs: list[float]) -> None:
        self.tokens, self.parents, self.path_probs = tokens, parents, path_probs
        self.probs: list[Tensor] = []

    def draw(self, probs: Tensor, frontier: list[int], places: list[int], generator) -> range:
        """Numbers of the tokens drawn, one for each place; those of one parent without replacement.

        distribution [n, V] after each token of the frontier. places: indices into the frontier.
        """
        begin = len(self.tokens)
        for i, parent in enumerate(frontier):
            rest, above = probs[i], self.path_probs[parent] if parent >= 0 else 1.0
            for rank in range(places.count(i)):
                if rank:
                    rest = rest.clone()
                    rest[self.tokens[-1]] = 0
                    rest /= rest.sum()
                token = sample(rest, generator)
                self.tokens.append(token)
                self.parents.append(parent)
                self.path_probs.append(above * _acceptance(float(probs[i, token]), rank))
                self.probs.append(rest)
        return range(begin, len(self.tokens))

    def draft(self, prefill_s: float) -> Draft:
        """With the chain of first children from the text on first, then the others as they are."""
        child: dict[int, int] = {}
        for node, parent in enumerate(self.parents):
            child.setdefault(parent, node)
        order, node = [], -1
        while node in child:
            node = child[node]
            order.append(node)
        chain = set(order)
        order += [node for node in range(len(self.tokens)) if node not in chain]
        place = {-1: -1} | {node: i for i, node in enumerate(order)}
        return Draft(
            [self.tokens[node] for node in order],
            torch.stack([self.probs[node] for node in order]) if self.probs else None,
            prefill_s,
            source=TreeDrafter.source,
            parents=[place[self.parents[node]] for node in order],
            path_probs=[self.path_probs[node] for node in order],
        )


def _places(probs: Tensor, path_probs: list[float]) -> list[tuple[float, int]]:
    """Where children may be drawn, best first: (the path probability that one is expected to have, index of its
    parent).

    distribution [n, V]: after each parent; one has as many places as its distribution has tokens, up to WIDTH.
    path_probs: of the parents.
    """
    chances = probs.topk(min(WIDTH, probs.shape[-1])).values.tolist()
    places = [
        (path_probs[i] * _acceptance(chance, rank), i)
        for i, row in enumerate(chances)
        for rank, chance in enumerate(row)
        if chance > 0
    ]
    return sorted(places, reverse=True)


def _acceptance(chance: float, rank: int) -> float:
    """How likely a child is accepted that has this probability and comes after `rank` siblings."""
    return (1 - AGREEMENT) * chance + (0.0 if rank else AGREEMENT)
