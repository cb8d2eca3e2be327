"""Drafting a tree with a smaller model: several ways on, where it is unsure, in one verification."""

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
AGREES = 0.4
DECAY=1.
UP,DOWN=1.25,.8
FRONTIER = 8  # tokens of a level that may have children


class TreeDrafter(ModelDrafter):
    """A LanguageModel that drafts trees of at most `nodes` tokens; limit("tree") bounds their levels.

    A tree grows level by level, each by one forward of the draft over the tokens that are worth it. A token's reach is
    the draft's probability of it and of all before it.

    Greedy: the tree of the greatest reach, as in EAGLE-2 (Li et al. 2024). Of all that was looked at the likeliest
    `nodes` tokens stay, and no level is begun that could not add to them.

    Sampling: children are drawn without replacement. How many a token has is decided before any of them is drawn,
    by the laws alone: one for each probability whose reach passes a threshold, which moves from round to round so that
    trees come out about full.

    The tokens come as the chain of first children from the text on, then the others, so that the likeliest rows of a
    verification lie where those of a chain would.
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

    def _feed(self, parents: list[int], tokens: list[int]) -> tuple[list[int], Tensor]:
        """(rows of these tokens, logits [n, V] after each). parents: their rows."""
        rows = list(range(len(self._fed), len(self._fed) + len(tokens)))
        self._row.update(zip(zip(parents, tokens, strict=True), rows, strict=True))
        self._fed += parents
        return rows, self.model.forward(tokens, self.cached - 1, self._fed)

    @property
    def _room(self) -> int:
        """Tokens of a level that may be fed."""
        return min(FRONTIER, self.model.max_rows - len(self._fed))

    def _likeliest(self, logits: Tensor, depth: int, limit: Limit) -> Draft:
        nodes, width = self.nodes, min(WIDTH, self.nodes, logits.shape[-1])
        # (-reach, number, token, number of the parent): in order, parents come before their children.
        pool: list[tuple[float, int, int, int]] = []
        frontier, rows = [(-1.0, -1, 0, 0)], {-1: 0}
        count = level = 0
        while True:
            level += 1
            chances, ids = torch.softmax(logits, -1, dtype=torch.float32).topk(width)
            begin, weakest = count, pool[-1][0] if len(pool) == nodes else 0.0
            for (above, parent, _, _), row_chances, row_ids in zip(frontier, chances.tolist(), ids.tolist(), strict=True):
                for chance, token in zip(row_chances, row_ids, strict=True):
                    if above * chance >= weakest:
                        break
                    pool.append((above * chance, count, token, parent))
                    count += 1
            pool.sort()
            del pool[nodes:]
            # No child of the last one of a full pool could enter it.
            frontier = [node for node in pool[: nodes - 1] if node[1] >= begin][: self._room]
            if level == depth or not frontier:
                break
            if limit.priced:
                # What the next level adds at most: its parents' reach, less that of what would have to leave.
                leaves = [0.0] * (nodes - len(pool)) + [node[0] for node in reversed(pool)]
                gain = sum(max(0.0, last - node[0]) for node, last in zip(frontier, leaves, strict=False))
                if not limit.pays(self.source, gain, 1, 1 + min(nodes, len(pool) + 1)):
                    break
            fed, logits = self._feed([rows[node[3]] for node in frontier], [node[2] for node in frontier])
            rows.update(zip((node[1] for node in frontier), fed, strict=True))
        if limit.priced:
            worth = (i for i in range(1, len(pool)) if not limit.pays(self.source, -pool[i][0], 0, i + 2))
            del pool[next(worth, nodes) :]
        place = {number: i for i, (_, number, _, _) in enumerate(pool)}
        place[-1] = -1
        return _tree([node[2] for node in pool], [place[node[3]] for node in pool], [-node[0] for node in pool])

    def _drawn(self, logits: Tensor, depth: int, limit: Limit) -> Draft:
        params = self.sampling
        tokens: list[int] = []
        parents: list[int] = []
        reach: list[float] = []
        laws: list[Tensor] = []
        frontier, rows = [-1], {-1: 0}
        level, priced_out, qualified = 0, False, 0
        while True:
            level += 1
            law = distribution(logits, params.temperature, params.top_k, params.top_p)
            scores = law.topk(min(WIDTH, law.shape[-1])).values.tolist()
            slots = [
                (-DECAY * (chance * (1 - AGREES) + AGREES * (rank == 0)) * (reach[node] if node >= 0 else 1.0), i)
                for i, node in enumerate(frontier)
                for rank, chance in enumerate(scores[i])
                if chance > 0
            ]
            slots.sort()
            counts = [0] * len(frontier)
            opened = 0
            for score, i in slots:
                at = len(tokens) + opened
                if at == self.nodes or (opened and level < depth and -score < self._threshold):
                    break
                if at and limit.priced and not limit.pays(self.source, -score, 0, at + 2):
                    priced_out = True
                    break
                qualified += -score >= self._threshold
                counts[i] += 1
                opened += 1
            if not opened: break
            begin = len(tokens)
            law0 = law.clone()
            for rank in range(max(counts)):
                chosen = [i for i, children in enumerate(counts) if children > rank]
                rest = law[chosen]
                if rank:
                    rest = rest / rest.sum(-1, keepdim=True)
                laws.append(rest)
                for i, row in zip(chosen, rest, strict=True):
                    token = sample(row, self._generator)
                    node = frontier[i]
                    tokens.append(token)
                    parents.append(node)
                    reach.append(DECAY*(float(law0[i][token]) * (1 - AGREES) + AGREES * (rank == 0)) * (reach[node] if node >= 0 else 1.0))
                    law[i, token] = 0
            new = range(begin, len(tokens))
            frontier = sorted(new, key=lambda i: -reach[i])[: self._room]
            if level == depth or not frontier or len(tokens) == self.nodes:
                break
            if limit.priced:
                gain = sum(reach[i] for i in frontier[: self.nodes - len(tokens)])
                if not limit.pays(self.source, gain, 1, len(tokens) + 2):
                    priced_out = True
                    break
            fed, logits = self._feed([rows[parents[i]] for i in frontier], [tokens[i] for i in frontier])
            rows.update(zip(frontier, fed, strict=True))
        if qualified < self.nodes and not priced_out:
            self._threshold *= DOWN
        elif len(tokens) == self.nodes and level < depth:
            self._threshold *= UP
        return _tree(tokens, parents, reach, torch.cat(laws))


def _tree(tokens: list[int], parents: list[int], reach: list[float], laws: Tensor | None = None) -> Draft:
    """A draft of these tokens: the chain of first children from the text on, then the others as they are."""
    child: dict[int, int] = {}
    for i, parent in enumerate(parents):
        child.setdefault(parent, i)
    order, last = [], -1
    while last in child:
        last = child[last]
        order.append(last)
    chain = set(order)
    order += [i for i in range(len(tokens)) if i not in chain]
    place = {-1: -1} | {old: new for new, old in enumerate(order)}
    return Draft(
        [tokens[i] for i in order],
        None if laws is None else laws[order],
        source=TreeDrafter.source,
        parents=[place[parents[i]] for i in order],
        reach=[reach[i] for i in order],
    )
