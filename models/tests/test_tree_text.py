"""Trees: the target's forward over one, the rule that walks down it, and whole texts written with tree drafts."""

import itertools

import pytest
import torch

from models.errors import UserError
from models.speculative import acceptance
from models.speculative.acceptance import accept_tree_greedy, accept_tree_sampled
from models.speculative.controller import AutoDraftLength, FixedDraftLength
from models.speculative.drafters.combined import Combined
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.drafters.tree import TreeDrafter
from models.speculative.generate import generate
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import GREEDY, build, build_pair, plain, random_prompt, speculate, upto
from models.tests.llama_fixtures import random_tensors, tiny_config
from models.tests.test_generate_sampling import P_VALUE
from models.tests.test_prompt_lookup import VOCAB, WARM, joint_law, p_values, tiny_model

#      0: the text's last token
#      1  2  3
#     4 5   6
#     7
PARENTS = [-1, 0, 0, 0, 1, 1, 3, 4]
TOKENS = [9, 1, 2, 3, 4, 5, 6, 7]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only slow models this small down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def path_to(row):
    """Rows from row 0 down to this one."""
    return [*path_to(PARENTS[row]), row] if row >= 0 else []


# --------------------------------------------------------------------------------------------- forward and keep
@pytest.fixture(params=["plain", "fixed rows", "folded heads"])
def model(request):
    options = {"fixed_rows": 12} if request.param == "fixed rows" else {}
    config = tiny_config(num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    if request.param != "folded heads":
        config = tiny_config()
    made = build(config, random_tensors(config, 3), max_seq_len=200, **options)
    assert made.fold == (4 if request.param == "folded heads" else 1)
    return made


@pytest.mark.parametrize("start", [1, 20, 125])
def test_every_row_of_a_tree_equals_its_path_alone(model, start):
    prompt = random_prompt(start, 1)
    model.prefill(prompt)
    rows = model.forward(TOKENS, start, PARENTS)
    for row in range(len(TOKENS)):
        path = path_to(row)
        model.prefill(prompt)
        alone = model.forward([TOKENS[i] for i in path], start)
        torch.testing.assert_close(rows[row], alone[-1], rtol=1e-4, atol=1e-4)
    assert model.greedy(TOKENS, start, PARENTS) == rows.argmax(-1).tolist()


def test_a_tree_may_be_fed_level_by_level(model):
    prompt = random_prompt(20, 1)
    model.prefill(prompt)
    whole = model.forward(TOKENS, 20, PARENTS)
    model.prefill(prompt)
    parts = [model.forward(TOKENS[a:b], 20, PARENTS[:b]) for a, b in ((0, 1), (1, 4), (4, 7), (7, 8))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [[0], [0, 1], [0, 3, 6], [0, 1, 4, 7], [0, 2]])
def test_kept_rows_become_the_sequence(model, rows):
    prompt = random_prompt(20, 1)
    model.prefill(prompt)
    model.forward(TOKENS, 20, PARENTS)
    assert model.keep(20, rows) == len(rows)
    after = model.forward([11], 20 + len(rows))
    model.prefill(prompt)
    model.forward([TOKENS[row] for row in rows], 20)
    torch.testing.assert_close(after, model.forward([11], 20 + len(rows)), rtol=1e-4, atol=1e-4)


def test_a_tree_needs_room_for_its_levels_not_for_its_rows(model):
    model.prefill(random_prompt(150, 1))
    model.forward(TOKENS, 196, PARENTS)
    with pytest.raises(UserError, match="4 tokens at position 197 do not fit the context of 200"):
        model.forward(TOKENS, 197, PARENTS)
    with pytest.raises(UserError, match="a tree of 33 rows exceeds"):
        model.forward([1] * 33, 20, [-1] + [0] * 32)


# -------------------------------------------------------------------------------------------------- the rules
@pytest.mark.parametrize("ids, path, after", [
    ([1, 4, 0, 0, 7, 0, 0, 5], [0, 3, 6], 5),
    ([3, 0, 0, 6, 0, 0, 8, 0], [2, 5], 8),
    ([2, 0, 4, 0, 0, 0, 0, 0], [1], 4),
    ([8, 0, 0, 0, 0, 0, 0, 0], [], 8),
])  # fmt: skip
def test_greedy_walks_where_the_target_goes(ids, path, after):
    parents = [parent - 1 for parent in PARENTS[1:]]
    assert accept_tree_greedy(TOKENS[1:], parents, ids) == (path, after)


def script(monkeypatch, refused):
    """Have the rule refuse so many children, then accept; returns where the laws come that it draws from."""
    answers, taken = iter([1 - 1e-15] * refused + [0.0] * 9), []
    monkeypatch.setattr(acceptance, "_uniform", lambda generator: next(answers))
    monkeypatch.setattr(acceptance, "sample", lambda law, generator: taken.append(law) or 0)
    return taken


def exact_law(p, q, children, monkeypatch):
    """Law of the token after the text: of all ways to draw so many children of q without replacement, and of all ways
    in which they can be refused, through `accept_tree_sampled` itself; p, q [V] fp64."""
    emitted = torch.zeros_like(p)
    for drawn in itertools.permutations(range(len(p)), children):
        laws, rest, chance = [], q.clone(), 1.0
        for token in drawn:
            laws.append(rest / rest.sum())
            chance *= float(laws[-1][token])
            rest[token] = 0
        if not chance:
            continue
        law, passed = p, chance
        for refused in range(children + 1):
            if passed < 1e-13:  # of these, one is certain to be kept
                break
            taken = script(monkeypatch, refused)
            rows = [p, *[torch.ones_like(p) / len(p)] * children]
            path, _ = accept_tree_sampled(list(drawn), [-1] * children, rows, torch.stack(laws), None)
            if refused == children:
                assert path == []
                emitted += passed * taken[-1]
            else:
                accept = min(1.0, float(law[drawn[refused]] / laws[refused][drawn[refused]]))
                assert not accept or path == [refused]
                emitted[drawn[refused]] += passed * accept
                passed *= 1 - accept
                law = acceptance.residual(law, laws[refused])
    return emitted


@pytest.mark.parametrize("children", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_siblings_were_drawn_what_leaves_follows_the_target(children, seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.softmax(2 * torch.randn(5, generator=generator, dtype=torch.float64), -1) for _ in range(2))
    if seed % 2:
        p[seed % 5] = 0
        p /= p.sum()
    torch.testing.assert_close(exact_law(p, q, children, monkeypatch), p, rtol=0, atol=1e-9)


def test_the_identity_finds_siblings_that_were_drawn_with_replacement(monkeypatch):
    """Laws that still hold the first sibling: what leaves is no longer the target's."""
    p, q = torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([0.6, 0.3, 0.1]).double()
    honest = acceptance.residual
    monkeypatch.setattr(acceptance, "residual", lambda law, draft: honest(law, q))
    assert (exact_law(p, q, 2, monkeypatch) - p).abs().max() > 0.01


# --------------------------------------------------------------------------------------------------- the drafter
def tree_text(target, draft, prompt, nodes, depth, **options):
    """(ids, stats) of a generation with trees."""
    stats = GenerationStats()
    drafter = TreeDrafter(draft, options.get("sampling", GREEDY), nodes)
    controller = options.pop("controller", FixedDraftLength(depth))
    tokens = generate(target, drafter, prompt, controller=controller, stats=stats, **options)
    return [token.id for token in tokens], stats


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.8, top_p=0.95, seed=2)])
@pytest.mark.parametrize("nodes", [1, 2, 5, 12, 31])
def test_a_tree_is_well_formed(nodes, sampling):
    _, draft = build_pair(2, 0.1)
    drafter = TreeDrafter(draft, sampling, nodes)
    tokens = random_prompt(10, 4)
    for depth in (1, 2, 4, 6):
        tree = drafter.propose(tokens, upto(depth))
        assert 1 <= len(tree.tokens) <= nodes and tree.source == "tree"
        levels = []
        for i, parent in enumerate(tree.parents):
            assert -1 <= parent < i
            levels.append(1 + (levels[parent] if parent >= 0 else 0))
            assert tree.reach[i] <= (tree.reach[parent] if parent >= 0 else 1.0) + 1e-6
        assert max(levels) <= depth
        chain = next((i for i, parent in enumerate(tree.parents) if parent != i - 1), len(levels))
        assert levels[:chain] == list(range(1, chain + 1))
        siblings = list(zip(tree.parents, tree.tokens, strict=True))
        assert len(set(siblings)) == len(siblings)
        assert (tree.probs is None) == sampling.greedy
        if tree.probs is not None:
            torch.testing.assert_close(tree.probs.sum(-1), torch.ones(len(levels)), rtol=1e-4, atol=1e-4)
            assert all(tree.probs[i, token] > 0 for i, token in enumerate(tree.tokens))
            for i, (parent, token) in enumerate(siblings):
                later = [j for j in range(i + 1, len(levels)) if tree.parents[j] == parent]
                assert all(tree.probs[j, token] == 0 for j in later)
        tokens.append(tree.tokens[0])


@pytest.mark.parametrize("noise", [0.0, 0.07, 0.2, None])
def test_greedy_text_with_trees_equals_plain_greedy(noise):
    """4 kinds of draft x 4 models x 3 prompts x 6 trees = 288 cases, with stop tokens and context ends among them."""
    accepted = []
    for seed in range(4):
        vocab_size = (8, 24, 64, 12)[seed]
        target, draft = build_pair(seed, noise, vocab_size, max_seq_len=60 if seed % 2 else 128)
        for number, length in enumerate((1, 9, 45)):
            prompt = random_prompt(length, 10 * seed + number, vocab_size)
            options = {"max_new_tokens": 24, "stop_ids": (5,) if number == 1 else ()}
            expected = plain(target, prompt, **options)
            for nodes, depth in ((1, 1), (3, 2), (6, 4), (11, 5), (31, 3), (31, 8)):
                ids, stats = tree_text(target, draft, prompt, nodes, depth, **options)
                assert ids == expected, (seed, length, nodes, depth)
                accepted += [r.accepted for r in stats.rounds]
    assert noise is None or max(accepted) >= 3
    assert min(accepted) == 0


def test_greedy_text_is_the_same_with_a_price_on_rows_and_with_copies_between():
    for seed in range(4):
        target, draft = build_pair(seed, 0.1, 16)
        prompt = random_prompt(30, seed, 16)
        expected = plain(target, prompt, max_new_tokens=40)
        ids, _ = tree_text(target, draft, prompt, 12, 5, controller=AutoDraftLength(), max_new_tokens=40)
        assert ids == expected
        drafter = Combined(PromptLookup(), TreeDrafter(draft, GREEDY, 8))
        stream = generate(target, drafter, prompt, controller=FixedDraftLength(3), max_new_tokens=40)
        assert [token.id for token in stream] == expected


def test_the_draft_is_always_fed_what_it_has_not_got_and_nothing_twice():
    """After any tree its proposals are those of a draft that reads everything anew."""
    target, draft = build_pair(1, 0.1, 24)
    fresh = build_pair(1, 0.1, 24)[1]
    drafter, tokens = TreeDrafter(draft, GREEDY, 10), random_prompt(10, 3, 24)
    target.prefill(tokens[:-1])
    for _ in range(12):
        tree = drafter.propose(tokens, upto(4))
        anew = TreeDrafter(fresh, GREEDY, 10).propose(tokens, upto(4))
        assert (tree.tokens, tree.parents) == (anew.tokens, anew.parents)
        parents = [-1, *(parent + 1 for parent in tree.parents)]
        rows = target.greedy([tokens[-1], *tree.tokens], len(tokens) - 1, parents)
        path, after = accept_tree_greedy(tree.tokens, tree.parents, rows)
        target.keep(len(tokens) - 1, [0, *(i + 1 for i in path)])
        tokens += [*(tree.tokens[i] for i in path), after]


def test_a_tree_accepts_no_less_than_a_chain_of_equal_depth():
    """Greedy: the chain of the likeliest tokens is in the tree, unless the tree has better use for the place."""
    chains = trees = 0
    for seed in range(8):
        target, draft = build_pair(seed, 0.15, 32)
        prompt = random_prompt(12, seed, 32)
        chain = speculate(target, draft, prompt, 4, max_new_tokens=60)[2]
        _, tree = tree_text(target, draft, prompt, 8, 4, max_new_tokens=60)
        chains += len(chain.rounds)
        trees += len(tree.rounds)
    assert trees < chains


def test_levels_that_do_not_pay_are_not_drafted():
    class Priced(FixedDraftLength):
        def pays(self, source, reach, steps, rows):
            return not steps and rows <= 4

    target, draft = build_pair(0, 0.1)
    draft.calls.clear()
    _, stats = tree_text(target, draft, random_prompt(10, 1), 12, 5, controller=Priced(5), max_new_tokens=12)
    assert {r.depth for r in stats.rounds if not r.cut} == {1}
    assert {r.drafted for r in stats.rounds if not r.cut} == {3}


@pytest.mark.parametrize("nodes, depth", [(2, 2), (4, 2), (7, 3)])
def test_sampled_text_with_trees_follows_the_targets_law(nodes, depth):
    target, draft = tiny_model(noise=0), tiny_model(noise=0.5)
    prompt, counts, stats = [3, 1, 4], torch.zeros([VOCAB] * 3, dtype=torch.long), []
    for seed in range(1200):
        sampling = SamplingParams(**WARM, seed=seed)
        ids, one = tree_text(target, draft, prompt, nodes, depth, sampling=sampling, max_new_tokens=depth + 2)
        counts[tuple(ids[:3])] += 1
        stats.append(one)
    rounds = GenerationStats.merge(stats).rounds
    assert {r.accepted for r in rounds} >= set(range(depth + 1))
    assert any(kept > 0 for r in rounds for kept in r.kept[:1]), "no second sibling was ever kept"
    assert min(p_values(counts, joint_law(target, prompt))) > P_VALUE


def test_the_law_would_show_a_rule_that_forgets_the_residual(monkeypatch):
    target, draft = tiny_model(noise=0), tiny_model(noise=0.5)
    monkeypatch.setattr(acceptance, "residual", lambda p, q: p)
    counts = torch.zeros([VOCAB] * 3, dtype=torch.long)
    for seed in range(1200):
        sampling = SamplingParams(**WARM, seed=seed)
        ids, _ = tree_text(target, draft, [3, 1, 4], 4, 2, sampling=sampling, max_new_tokens=4)
        counts[tuple(ids[:3])] += 1
    assert min(p_values(counts, joint_law(target, [3, 1, 4]))) < P_VALUE / 100


@pytest.mark.parametrize("nodes", [0, 32])
def test_sizes_outside_a_tile_are_refused(nodes):
    with pytest.raises(UserError, match=f"a tree of {nodes} tokens: must be between 1 and 31"):
        TreeDrafter(build_pair(0, None)[1], GREEDY, nodes)
