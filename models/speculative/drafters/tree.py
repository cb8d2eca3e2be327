"""Drafting a tree with a smaller model: several ways on where it is unsure, in one verification."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.errors import UserError
from models.speculative.acceptance import distribution, sample
from models.speculative.controller import MAX_DRAFT_LENGTH
from models.speculative.drafters import Draft, Limit
from models.speculative.drafters.model import ModelDrafter
from models.speculative.language_model import LanguageModel
from models.speculative.sampling import SamplingParams

WIDTH = 8  # children that a token may have
FRONTIER = 4  # tokens of a level that may have children; 8 give no longer texts (embedded pair, 6 to 31 tokens)
# Sampling: how often draft and target are so much of one mind that a first child is accepted whatever it is. Without
# it, siblings are overrated: trees of 6 tokens then gave less than chains of 4 (embedded pair, temperature 0.8). 0.2
# to 0.6 make little difference.
ONE_MIND = 0.4


class TreeDrafter(ModelDrafter):
    """A LanguageModel that drafts trees of at most `nodes` tokens; limit("tree") bounds their levels.

    A tree grows level by level, each by one forward of the draft over the tokens that are worth it. A token's reach is
    the chance, as far as the draft knows, that the text gets there.

    Greedy: reach is the probability of the token and all before it. The tree is the one of the greatest reach, as in
    EAGLE-2 (Li et al. 2024): of all that was looked at the likeliest `nodes` tokens stay, and no level is begun that
    could not add to them.

    Sampling: children are drawn without replacement, and how many a token has is decided by laws alone, before any of
    them is drawn. Places for children are opened where their expected reach passes a threshold, which moves from round
    to round so that trees just fill; in the last level whatever is left is filled.

    Tokens come as the chain of first children from the text on, then the others, so that the likeliest rows of a
    verification lie where those of a chain would.

    Raises UserError for a number of tokens that is not between 1 and 31.
    """

    source = "tree"

    def __init__(self, model: LanguageModel, sampling: SamplingParams, nodes: int) -> None:
        if not 1 <= nodes <= MAX_DRAFT_LENGTH:
            raise UserError(f"a tree of {nodes} tokens: must be between 1 and {MAX_DRAFT_LENGTH}")
        super().__init__(model, sampling)
        self.nodes = nodes
        self._fed: list[int] = []  # parent of each of the tree's rows in the model's cache, from the text's last token
        self._row: dict[tuple[int, int], int] = {}  # row of a parent and a token -> row of the token
        self._threshold = 0.5 / nodes

    def propose(self, tokens: list[int], limit: Limit) -> Draft:
        """Draft a tree as deep as allowed and as the model's own context has room for, after catching up."""
        depth = min(limit(self.source), self.model.max_seq_len - len(tokens) + 1)  # the last level is not written
        if depth < 1:
            return Draft([])
        prefill_s = self.read_prompt(tokens)
        self._keep_path(tokens)
        position, pending = self.catch_up(tokens)
        logits = self.model.forward(pending, position)[-1:]
        self.cached, self._fed = len(tokens), [-1]
        grow = self._likeliest if self.sampling.greedy else self._drawn
        return grow(logits, depth, limit)._replace(prefill_s=prefill_s)

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

    def _feed(self, parents: list[int], tokens: list[int]) -> tuple[range, Tensor]:
        """(rows of these tokens, logits [n, V] after each). parents: the rows they follow."""
        rows = range(len(self._fed), len(self._fed) + len(tokens))
        self._row.update(zip(zip(parents, tokens, strict=True), rows, strict=True))
        self._fed += parents
        return rows, self.model.forward(tokens, self.cached - 1, self._fed)

    # --------------------------------------------------------------------------------------------------- greedy
    def _likeliest(self, logits: Tensor, depth: int, limit: Limit) -> Draft:
        nodes, width = self.nodes, min(WIDTH, self.nodes, logits.shape[-1])
        # (-reach, number, token, number of the parent): in order, parents come before their children.
        pool: list[tuple[float, int, int, int]] = []
        frontier, rows = [(-1.0, -1, 0, 0)], {-1: 0}
        number = level = 0
        while True:
            level += 1
            chances, ids = torch.softmax(logits, -1, dtype=torch.float32).topk(width)
            begin, weakest = number, pool[-1][0] if len(pool) == nodes else 0.0
            for node, node_chances, node_ids in zip(frontier, chances.tolist(), ids.tolist(), strict=True):
                for chance, token in zip(node_chances, node_ids, strict=True):
                    if node[0] * chance >= weakest:
                        break
                    pool.append((node[0] * chance, number, token, node[1]))
                    number += 1
            pool.sort()
            del pool[nodes:]
            # No child of the last one of a full pool could enter it.
            frontier = [node for node in pool[: nodes - 1] if node[1] >= begin][: self._room]
            if level == depth or not frontier or not self._level_pays(frontier, pool, limit):
                break
            fed, logits = self._feed([rows[node[3]] for node in frontier], [node[2] for node in frontier])
            rows.update(zip((node[1] for node in frontier), fed, strict=True))
        if limit.priced:
            unpaid = (i for i in range(1, len(pool)) if not limit.pays(self.source, -pool[i][0], 0, i + 2))
            del pool[next(unpaid, nodes) :]
        place = {-1: -1} | {node[1]: i for i, node in enumerate(pool)}
        return self._draft([node[2] for node in pool], [place[node[3]] for node in pool], [-node[0] for node in pool])

    def _level_pays(self, frontier: list[tuple], pool: list[tuple], limit: Limit) -> bool:
        """Whether to feed these tokens: at most their reach is added, less that of what leaves a full pool for it."""
        if not limit.priced:
            return True
        leaving = [0.0] * (self.nodes - len(pool)) + [node[0] for node in reversed(pool)]
        gain = sum(max(0.0, leaves - node[0]) for node, leaves in zip(frontier, leaving, strict=False))
        return limit.pays(self.source, gain, 1, 1 + min(self.nodes, len(pool) + 1))

    # ------------------------------------------------------------------------------------------------- sampling
    def _drawn(self, logits: Tensor, depth: int, limit: Limit) -> Draft:
        params, nodes, threshold = self.sampling, self.nodes, self._threshold
        tree = _DrawnTree(self._generator)
        frontier, rows = [-1], {-1: 0}
        level = passed = 0  # places opened that are above the threshold
        while True:
            level += 1
            last = level == depth or not self._room
            law = distribution(logits, params.temperature, params.top_k, params.top_p)
            places = _places(law, [tree.reach[number] for number in frontier])
            count, paid = self._open(places, len(tree.tokens), last, limit)
            new = tree.draw(law, frontier, [i for _, i in places[:count]])
            passed += sum(reach >= threshold for reach, _ in places[:count])
            new = sorted(new, key=lambda number: -tree.reach[number])[: self._room]
            left = nodes - len(tree.tokens)
            if not left or not new or last:
                break
            if limit.priced:
                gain = sum(tree.reach[number] for number in new[:left])
                paid = limit.pays(self.source, gain, 1, len(tree.tokens) + 2)
                if not paid:
                    break
            frontier = new
            fed, logits = self._feed([rows[tree.parents[i]] for i in frontier], [tree.tokens[i] for i in frontier])
            rows.update(zip(frontier, fed, strict=True))
        left_out = [reach for reach, _ in places[count:]] + [tree.reach[number] for number in new if not last]
        if not left and max(left_out, default=0.0) >= threshold:
            self._threshold = min(1.0, 1.25 * threshold)
        elif paid and passed < nodes:
            self._threshold = max(0.01 / nodes, 0.8 * threshold)
        reach = [tree.reach[number] for number in range(len(tree.tokens))]
        return self._draft(tree.tokens, tree.parents, reach, torch.cat(tree.laws))

    def _open(self, places: list[tuple[float, int]], size: int, last: bool, limit: Limit) -> tuple[int, bool]:
        """(how many of these places to open in a tree that has `size` tokens, False if a further one did not pay)."""
        places = places[: self.nodes - size]
        for count, (reach, _) in enumerate(places):
            if reach < self._threshold and count and not last:
                return count, True
            if limit.priced and size + count and not limit.pays(self.source, reach, 0, size + count + 2):
                return count, False
        return len(places), True

    def _draft(self, tokens: list[int], parents: list[int], reach: list[float], laws: Tensor | None = None) -> Draft:
        """Of these tokens: the chain of first children from the text on, then the others as they are."""
        child: dict[int, int] = {}
        for number, parent in enumerate(parents):
            child.setdefault(parent, number)
        order, number = [], -1
        while number in child:
            number = child[number]
            order.append(number)
        chain = set(order)
        order += [number for number in range(len(tokens)) if number not in chain]
        place = {-1: -1} | {number: i for i, number in enumerate(order)}
        return Draft(
            [tokens[number] for number in order],
            None if laws is None else laws[order],
            source=self.source,
            parents=[place[parents[number]] for number in order],
            reach=[reach[number] for number in order],
        )


class _DrawnTree:
    """Tokens drawn so far, numbered; -1 is the text's last token."""

    def __init__(self, generator: torch.Generator) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.laws: list[Tensor] = []  # [some, V]
        self.reach: dict[int, float] = {-1: 1.0}
        self._generator = generator

    def draw(self, law: Tensor, frontier: list[int], places: Sequence[int]) -> range:
        """Numbers of the tokens drawn, one for each place; those of one token without replacement.

        law [n, V] after each token of the frontier, which is used up. places: indices into the frontier.
        """
        begin = len(self.tokens)
        counts = [places.count(i) for i in range(len(frontier))]
        for rank in range(max(counts)):
            chosen = [i for i, count in enumerate(counts) if count > rank]
            rest = law[chosen]
            if rank:
                rest = rest / rest.sum(-1, keepdim=True)
            drawn = [sample(row, self._generator) for row in rest]
            for i, token, chance in zip(chosen, drawn, law[chosen, drawn].tolist(), strict=True):
                self.reach[len(self.tokens)] = self.reach[frontier[i]] * _acceptance(chance, rank)
                self.tokens.append(token)
                self.parents.append(frontier[i])
            law[chosen, drawn] = 0
            self.laws.append(rest)
        return range(begin, len(self.tokens))


def _places(law: Tensor, reach: list[float]) -> list[tuple[float, int]]:
    """Where children may be drawn, best first: (the reach that one is expected to have, index of its parent).

    law [n, V]: after each parent; one has as many places as its law has tokens, up to WIDTH. reach: of the parents.
    """
    chances = law.topk(min(WIDTH, law.shape[-1])).values.tolist()
    places = [
        (reach[i] * _acceptance(chance, rank), i)
        for i, row in enumerate(chances)
        for rank, chance in enumerate(row)
        if chance > 0
    ]
    return sorted(places, reverse=True)


def _acceptance(chance: float, rank: int) -> float:
    """How likely a child is accepted that has this probability and comes after `rank` siblings."""
    return (1 - ONE_MIND) * chance + (ONE_MIND if rank == 0 else 0.0)
