"""Trees are lossless: whatever is drafted, what leaves follows the target, shown by enumeration and by counting.

The enumeration is exact: every random number that the code asks for is a fork, both ways are gone, and each way's
probability is read off the code's own comparison. Nothing of the rule is written down a second time.
"""

import itertools
from collections import Counter, defaultdict

import pytest
import torch

from models.speculative import acceptance
from models.speculative.acceptance import accept_tree_greedy, accept_tree_sampled
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters import tree as tree_module
from models.speculative.drafters.in_step import InStep
from models.speculative.drafters.tree import TreeDrafter
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import draw_texts, upto
from models.tests.test_generate_sampling import P_VALUE, PROMPT, SLOTS, VOCAB, p_values, tiny_model

WORDS = 3  # vocabulary of the enumerations


pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------- enumeration
class Fork:
    """Takes the place of chance: `choose(probabilities)` goes one way now, and the others when called again."""

    def __init__(self):
        self.todo: list[list[int]] = [[]]

    def ways(self, run):
        """(probability, what run() returned) for every way it can go."""
        while self.todo:
            self.script, self.taken, self.chance = self.todo.pop(), [], 1.0
            result = run()
            yield self.chance, result

    def choose(self, probabilities):
        if len(self.taken) == len(self.script):  # a fork not met before
            first, *others = (way for way, chance in enumerate(probabilities) if chance > 0)
            self.todo += [[*self.taken, other] for other in others]
            self.script.append(first)
        way = self.script[len(self.taken)]
        self.taken.append(way)
        self.chance *= probabilities[way]
        return way

    def sample(self, law, generator):
        return self.choose((law / law.sum()).tolist())

    def uniform(self, generator):
        return Uniform(self)


class Uniform:
    """A number u drawn from [0, 1) of which the code asks whether u q < p."""

    def __init__(self, fork):
        self.fork, self.q = fork, 1.0

    def __mul__(self, q):
        self.q = q
        return self

    def __lt__(self, p):
        chance = min(1.0, p / self.q) if self.q else float(p > 0)
        return self.fork.choose([chance, 1 - chance]) == 0


@pytest.fixture
def fork(monkeypatch):
    fork = Fork()
    monkeypatch.setattr(acceptance, "_uniform", fork.uniform)
    monkeypatch.setattr(acceptance, "sample", fork.sample)
    monkeypatch.setattr(tree_module, "sample", fork.sample)
    return fork


class Laws(dict):
    """A law [WORDS] fp64 after every prefix, made when asked for."""

    KINDS = ("dense", "sharp", "masked")

    def __init__(self, seed, kind):
        super().__init__()
        self.seed, self.kind = seed, kind

    def __missing__(self, prefix):
        generator = torch.Generator().manual_seed(hash((self.seed, prefix)) % 2**63)
        logits = (4 if self.kind == "sharp" else 1.5) * torch.randn(WORDS, generator=generator, dtype=torch.float64)
        if self.kind == "masked":  # another token each time, and sometimes all but one
            masked = torch.randint(0, 2, (WORDS,), generator=generator) == 0
            logits[masked & (logits < logits.max())] = -torch.inf
        self[prefix] = torch.softmax(logits, -1)
        return self[prefix]


def pairs(count):
    """(p, q): every kind of target with every kind of draft, and a draft equal to the target."""
    for seed in range(count):
        for target, draft in itertools.product(Laws.KINDS, repeat=2):
            yield pytest.param(Laws(2 * seed, target), Laws(2 * seed + 1, draft), id=f"{target}-{draft}-{seed}")
        yield pytest.param(Laws(2 * seed, "dense"), Laws(2 * seed, "dense"), id=f"equal-{seed}")


def paths(tokens, parents):
    """What stands before a tree's tokens and after them: the prefix () of the text, and that of every token."""
    prefixes = [()]
    for token, parent in zip(tokens, parents, strict=True):
        prefixes.append((*prefixes[parent + 1], token))
    return prefixes


def check_identity(fork, draft, p, depth, atol):
    """The joint law of the tokens that leave, continued by p where fewer leave, is p's own.

    draft() -> (tokens, parents, q), which may ask fork.
    """

    def round():
        tokens, parents, q = draft()
        rows = [p[prefix] for prefix in paths(tokens, parents)]
        path, after = accept_tree_sampled(tokens, parents, rows, q, None)
        return *(tokens[i] for i in path), after

    emitted, total = defaultdict(float), 0.0
    for chance, block in fork.ways(round):
        total += chance
        for rest in itertools.product(range(WORDS), repeat=max(0, depth - len(block))):
            text = (*block, *rest)[:depth]
            emitted[text] += chance * joint(p, text, len(block))
    assert abs(total - 1) < atol
    error = max(abs(emitted[text] - joint(p, text)) for text in itertools.product(range(WORDS), repeat=depth))
    assert error < atol, error


def joint(p, text, given=0):
    """p's probability of a text whose first tokens are given."""
    chance = 1.0
    for i in range(given, len(text)):
        chance *= float(p[text[:i]][text[i]])
    return chance


def children_of_each(parents):
    return Counter(parents).values()


SHAPES = [
    parents
    for size in range(1, 5)
    for parents in itertools.product(*(range(-1, i) for i in range(size)))
    if max(children_of_each(parents)) <= WORDS
]


def grown(fork, q, may_have, most=4):
    """(tokens, parents, laws) of a tree that grows token by token.

    may_have(prefix, siblings so far, q): whether the token after prefix may have one more child.
    """
    tokens, parents, laws = [], [], []
    node = -1
    while node < len(tokens):
        prefix = paths(tokens, parents)[node + 1]
        rest = q[prefix].clone()
        while len(tokens) < most and rest.sum() > 0 and may_have(node, prefix, parents.count(node), q):
            law = rest / rest.sum()
            token = fork.sample(law, None)
            tokens.append(token)
            parents.append(node)
            laws.append(law)
            rest[token] = 0
        node += 1
    return tokens, parents, torch.stack(laws)


def test_all_small_shapes_are_tried():
    assert len(SHAPES) == 1 + 2 + 6 + 23  # one of four tokens has more children than there are words
    assert (-1, -1, 0, 1) in SHAPES and (-1, 0, 1, 2) in SHAPES


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_lossless(fork, shape):
    """Children in the order of their index, which need not stand side by side."""
    for seed, (target, kind) in enumerate(itertools.product(Laws.KINDS, Laws.KINDS[:2])):
        p, q = Laws(seed, target), Laws(seed + 100, kind)

        def drawn(q=q):
            tokens, laws = [], []
            for i, parent in enumerate(shape):
                law = q[paths(tokens, shape[:i])[parent + 1]].clone()
                law[[tokens[j] for j in range(i) if shape[j] == parent]] = 0
                laws.append(law / law.sum())
                tokens.append(fork.sample(laws[-1], None))
            return tokens, shape, torch.stack(laws)

        fork.todo = [[]]
        check_identity(fork, drawn, p, depth=2, atol=1e-12)


RULES = {
    "as many as likely": lambda node, prefix, siblings, q: siblings < int((q[prefix] > 0.25).sum()),
    "by the path": lambda node, prefix, siblings, q: len(prefix) < 2 and siblings < 1 + sum(prefix) % 3,
    "by what was drawn before": lambda node, prefix, siblings, q: siblings < (2 if 0 in prefix or node < 0 else 1),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("p, q", pairs(2))
def test_shapes_that_depend_on_laws_and_earlier_tokens_are_lossless(fork, p, q, rule):
    check_identity(fork, lambda: grown(fork, q, RULES[rule]), p, depth=3, atol=1e-12)


@pytest.mark.parametrize("p, q", pairs(1))
def test_a_tree_chosen_without_chance_is_lossless(fork, p, q):
    """The likeliest tokens of the draft, for which there are no laws: q is None."""

    def chosen():
        first = q[()].argsort(descending=True)[:2].tolist()
        return [*first, int(q[first[0],].argmax())], [-1, -1, 0], None

    check_identity(fork, chosen, p, depth=2, atol=1e-12)


def test_a_shape_that_depends_on_the_token_itself_is_not_lossless(fork):
    """What the identity is there to find: a child left out because of what was drawn for it."""
    p, q = Laws(0, "dense"), Laws(1, "dense")

    def pruned():
        law = q[()]
        token = fork.sample(law, None)
        return ([token], [-1], law[None]) if law[token] > 0.3 else ([], [], None)

    with pytest.raises(AssertionError, match="0.0|0.1|0.2"):
        check_identity(fork, pruned, p, depth=1, atol=1e-3)


# -------------------------------------------------------------------------------------------- the drafter itself
class TableModel:
    """A draft whose laws after each prefix are given."""

    vocab_size, max_seq_len, max_rows = WORDS, 64, 32

    def __init__(self, laws):
        self.probs = laws

    def prefill(self, tokens):
        return torch.zeros(WORDS)

    def forward(self, tokens, position, parents=None):
        if parents is None:
            self.rows = [()]
        else:
            for token, parent in zip(tokens, parents[-len(tokens) :], strict=True):
                self.rows.append((*self.rows[parent], token))
        return torch.stack([self.probs[prefix].log() for prefix in self.rows[-len(tokens) :]])


def drafted(fork, q, nodes, depth, threshold, **masks):
    """draft() for `check_identity` by a TreeDrafter that has drafted nothing yet."""
    sampling = SamplingParams(temperature=1.0, **masks)

    def draft():
        drafter = TreeDrafter(TableModel(q), sampling, nodes)
        drafter._threshold = threshold
        proposed = drafter.propose([0], upto(depth))
        return proposed.tokens, proposed.parents, proposed.probs

    return draft


@pytest.mark.parametrize("nodes, depth", [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (4, 2), (3, 3), (4, 3)])
@pytest.mark.parametrize("threshold", [0.05, 0.3])
def test_trees_of_the_drafter_are_lossless(fork, nodes, depth, threshold):
    """With the laws in fp32 that it has."""
    for p, q in (case.values for case in pairs(1)):
        fork.todo = [[]]
        check_identity(fork, drafted(fork, q, nodes, depth, threshold), p, depth=min(depth + 1, 3), atol=1e-6)


@pytest.mark.parametrize("masks", [{"top_k": 2}, {"top_p": 0.7}, {"top_k": 1}])
def test_trees_of_masked_drafts_are_lossless(fork, masks):
    for p, q in (case.values for case in pairs(1)):
        fork.todo = [[]]
        check_identity(fork, drafted(fork, q, 4, 2, 0.1, **masks), p, depth=2, atol=1e-6)


def draws_with_replacement(monkeypatch, fork):
    """While laws are still those without."""
    right = tree_module._Tree.draw

    def draw(tree, law, frontier, places, generator):
        monkeypatch.setattr(tree_module, "sample", lambda rest, generator: fork.sample(law[0], generator))
        return right(tree, law, frontier, places, generator)

    monkeypatch.setattr(tree_module._Tree, "draw", draw)


def gives_laws_that_hold_siblings(monkeypatch, fork):
    right = tree_module._Tree.draw

    def draw(tree, law, frontier, places, generator):
        new = right(tree, law, frontier, places, generator)
        for node in new:
            tree.probs[node] = law[frontier.index(tree.parents[node])]
        return new

    monkeypatch.setattr(tree_module._Tree, "draw", draw)


def leaves_out_a_token_for_what_it_is(monkeypatch, fork):
    right = tree_module._Tree.draft

    def draft(tree, prefill_s):
        if len(tree.tokens) > 1 and tree.tokens[-1] == 0:
            for each in (tree.tokens, tree.parents, tree.path_probs, tree.probs):
                each.pop()
        return right(tree, prefill_s)

    monkeypatch.setattr(tree_module._Tree, "draft", draft)


def proposes_siblings_in_another_order(monkeypatch, fork):
    """Than that in which they were drawn."""
    right = tree_module._Tree.draft

    def draft(tree, prefill_s):
        order = sorted(range(len(tree.tokens)), key=lambda i: tree.tokens[i])
        for each in (tree.tokens, tree.path_probs, tree.probs):
            each[:] = [each[i] for i in order]
        return right(tree, prefill_s)

    monkeypatch.setattr(tree_module._Tree, "draft", draft)


def forgets_the_residual(monkeypatch, fork):
    monkeypatch.setattr(acceptance, "residual", lambda p, q: p)


@pytest.mark.parametrize("mistake", [
    draws_with_replacement, gives_laws_that_hold_siblings, leaves_out_a_token_for_what_it_is,
    proposes_siblings_in_another_order, forgets_the_residual,
])  # fmt: skip
def test_the_enumeration_finds_wrong_drafters(monkeypatch, fork, mistake):
    mistake(monkeypatch, fork)
    with pytest.raises(AssertionError):
        for seed in range(9):  # with so few words some mistakes do no harm to some laws
            fork.todo = [[]]
            check_identity(fork, drafted(fork, Laws(-1, "dense"), 2, 1, 0.01), Laws(seed, "dense"), depth=1, atol=1e-3)


# ------------------------------------------------------------------------------------------- the rules' walk
#      0  1      children of the text; 2 and 3 of 0, 4 of 1, 5 of 3
TOKENS, PARENTS = [7, 8, 7, 9, 7, 5], [-1, -1, 0, 0, 1, 3]


@pytest.mark.parametrize("ids, path, after", [
    ([7, 9, 0, 0, 5, 0, 4], [0, 3, 5], 4), ([7, 9, 0, 0, 6, 0, 0], [0, 3], 6), ([8, 0, 7, 0, 0, 6, 0], [1, 4], 6),
    ([7, 1, 0, 0, 0, 0, 0], [0], 1), ([9, 7, 7, 7, 7, 7, 7], [], 9),
])  # fmt: skip
def test_greedy_follows_the_targets_choices(ids, path, after):
    assert accept_tree_greedy(TOKENS, PARENTS, ids) == (path, after)


def test_nothing_drafted_leaves_the_targets_own(fork):
    assert accept_tree_greedy([], [], [9]) == ([], 9)
    check_identity(fork, lambda: ([], [], None), Laws(0, "dense"), depth=2, atol=1e-12)


# ------------------------------------------------------------------------------------------------ the real loop
@pytest.fixture(scope="module")
def models():
    """(target, draft)"""
    return tiny_model(noise=0, slots=SLOTS), tiny_model(noise=0.5, slots=SLOTS)


def write_texts(models, params, nodes, depth, greedy_draft=False, texts=900):
    """Counts [VOCAB] * 4 of the four tokens of each text, and the statistics of all of them."""
    target, draft = models

    def drafts(sequence):
        sampling = SamplingParams() if greedy_draft else sequence.request.sampling
        return TreeDrafter(draft.slot(sequence.slot), sampling, nodes)

    counts, stats = draw_texts(
        target,
        InStep(drafts, draft),
        PROMPT,
        params,
        texts,
        controller=lambda: FixedDraftLength(depth),
        vocab=VOCAB,
    )
    return counts, GenerationStats.merge(stats)


@pytest.mark.parametrize("params, nodes, depth, greedy_draft", [
    pytest.param({"temperature": 1.0}, 4, 2, False, id="temperature-1"),
    pytest.param({"temperature": 0.7}, 7, 2, False, id="cool"),
    pytest.param({"temperature": 1.3, "top_k": 5}, 3, 2, False, id="top_k"),
    pytest.param({"temperature": 1.3, "top_p": 0.85}, 9, 2, False, id="top_p"),
    pytest.param({"temperature": 0.8}, 5, 2, True, id="deterministic-draft"),
])  # fmt: skip
def test_joint_law_of_the_text_is_the_targets(models, params, nodes, depth, greedy_draft):
    """Tokens 2 and 3 are drafted first, 4 is the bonus or of another round."""
    counts, stats = write_texts(models, params, nodes, depth, greedy_draft)
    whole = [r for r in stats.rounds if r.depth == depth]
    assert {r.accepted for r in whole} == set(range(depth + 1))
    assert sum(any(r.parents[i] in r.parents[:i] for i in r.kept) for r in whole) > 20, "later siblings hardly count"
    assert min(p_values(models, params, counts)) > P_VALUE


def later_siblings_come_from_the_whole_law(monkeypatch):
    sample, right = tree_module.sample, tree_module._Tree.draw

    def draw(tree, law, frontier, places, generator):
        monkeypatch.setattr(tree_module, "sample", lambda rest, generator: sample(law[0], generator))
        return right(tree, law, frontier, places, generator)

    monkeypatch.setattr(tree_module._Tree, "draw", draw)


def one_stream_for_both(monkeypatch):
    right = SamplingParams.generator
    monkeypatch.setattr(SamplingParams, "generator", lambda self, stream: right(self, "target"))


@pytest.mark.parametrize("mistake", [later_siblings_come_from_the_whole_law, one_stream_for_both])
def test_the_statistic_finds_wrong_rules(monkeypatch, models, mistake):
    mistake(monkeypatch)
    counts, _ = write_texts(models, {"temperature": 1.0}, 4, 1, texts=700)
    monkeypatch.undo()
    assert min(p_values(models, {"temperature": 1.0}, counts)) < P_VALUE / 100
