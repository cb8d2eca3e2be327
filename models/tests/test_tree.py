"""TreeDrafter with real models: the trees it proposes, the cache it keeps, the texts that come of it."""

import heapq
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from models.errors import UserError
from models.loading import load_model, open_model
from models.speculative.acceptance import distribution
from models.speculative.control.policy import AutoDraftLength, FixedDraftLength
from models.speculative.drafters import Limit
from models.speculative.drafters.combined import Combined
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.drafters.tree import FRONTIER, WIDTH, TreeDrafter
from models.speculative.generate import generate
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import (
    GREEDY,
    SpyLlama,
    build,
    build_pair,
    engine_config,
    perturbed,
    plain,
    random_prompt,
    speculate,
    upto,
)
from models.tests.llama_fixtures import random_tensors

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
PROMPTS = Path(__file__).parents[2] / "demo" / "prompts" / "python.txt"
WARM = SamplingParams(temperature=0.8, top_k=12, top_p=0.95, seed=3)
VOCAB = 24


pytestmark = pytest.mark.usefixtures("one_thread")


def draft_model(seed=5, **options) -> SpyLlama:
    """Sure of itself here and there, so that trees are now deep, now broad."""
    config = engine_config(VOCAB)
    tensors = random_tensors(config, seed)
    tensors["lm_head.weight"] *= 2.5
    return build(config, tensors, **{"max_seq_len": 512, **options})


def paths(draft) -> list[tuple[int, ...]]:
    """Of every token: the tokens from the text to it."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents or (), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def levels(draft) -> int:
    return max(map(len, paths(draft)), default=0)


# ------------------------------------------------------------------------------------------------ what is proposed
def likeliest(model, tokens, nodes, depth) -> dict[tuple[int, ...], float]:
    """The tree of the greatest reach: path -> reach. Best first, reading the whole text for every token."""
    found, heap = {}, [(-1.0, ())]
    while heap and len(found) <= nodes:
        reach, path = heapq.heappop(heap)
        found[path] = -reach
        if len(path) < depth:
            for token, chance in enumerate(torch.softmax(model.prefill([*tokens, *path]), -1).tolist()):
                heapq.heappush(heap, (reach * chance, (*path, token)))
    del found[()]
    return found


@pytest.mark.parametrize("nodes", range(1, 6))
def test_a_greedy_tree_is_the_one_of_the_greatest_reach(nodes):
    """Exactly, as long as all of a level that are worth it can be fed."""
    assert nodes <= min(FRONTIER + 1, WIDTH)
    model, reader = draft_model(), draft_model()
    branched = 0
    for seed in range(12):
        tokens = random_prompt(1 + 3 * seed, seed, VOCAB)
        depth = 1 + seed % 5
        draft = TreeDrafter(model, GREEDY, nodes).propose(tokens, upto(depth))
        expected = likeliest(reader, tokens, nodes, depth)
        assert dict(zip(paths(draft), draft.path_probs, strict=True)) == pytest.approx(expected, rel=1e-3)
        branched += draft.parents != list(range(-1, len(draft.tokens) - 1))
    assert branched or nodes == 1


@pytest.mark.parametrize("sampling", [GREEDY, WARM, SamplingParams(temperature=1.5)], ids=str)
@pytest.mark.parametrize("nodes", [1, 2, 7, 16, 31])
def test_every_tree_is_one(nodes, sampling):
    sizes, deepest = Counter(), 0
    drafter = TreeDrafter(draft_model(), sampling, nodes)
    tokens = random_prompt(9, 4, VOCAB)
    for turn in range(24):
        depth = 1 + turn % 6
        draft = drafter.propose(tokens, upto(depth))
        n = len(draft.tokens)
        assert 1 <= n <= nodes and levels(draft) <= depth
        assert n == len(draft.parents) == len(draft.path_probs)
        assert all(-1 <= parent < i for i, parent in enumerate(draft.parents)), "parents come first"
        assert len(set(paths(draft))) == n, "siblings differ"
        assert max(Counter(draft.parents).values()) <= WIDTH
        for reach, parent in zip(draft.path_probs, draft.parents, strict=True):
            assert 0 < reach <= (draft.path_probs[parent] if parent >= 0 else 1.0)
        # The first children from the text on, then tokens none of which continues them.
        chain = next((i for i, parent in enumerate(draft.parents) if parent != i - 1), n)
        assert all(draft.parents.index(i - 1) == i for i in range(chain)) and chain - 1 not in draft.parents
        assert draft.source == "tree" and draft.fused is None
        assert (draft.prefill_s > 0) == (turn == 0)
        sizes[n], deepest = sizes[n] + 1, max(deepest, levels(draft))
        drafter.observe(0)
        tokens = [*tokens, *paths(draft)[turn % n], turn % VOCAB]
    assert deepest >= min(nodes, 4) or sampling.greedy and nodes == 2
    assert sizes[nodes] > 6 or nodes > 12


def test_greedy_reach_is_the_probability_of_the_path_and_its_chain_the_drafts_own_text():
    model, reader = draft_model(), draft_model()
    tokens = random_prompt(20, 1, VOCAB)
    draft = TreeDrafter(model, GREEDY, 20).propose(tokens, upto(5))
    for path, reach in zip(paths(draft), draft.path_probs, strict=True):
        chance = 1.0
        for i, token in enumerate(path):
            chance *= torch.softmax(reader.prefill([*tokens, *path[:i]]), -1)[token].item()
        assert reach == pytest.approx(chance, rel=1e-3)
    chain = max((p for i, p in enumerate(paths(draft)) if len(p) == i + 1), key=len)
    assert list(chain) == plain(reader, tokens, max_new_tokens=len(chain))
    assert draft.probs is None


@pytest.mark.parametrize("sampling", [WARM, SamplingParams(temperature=1.2, seed=1), SamplingParams(0.7, top_k=2)])
def test_a_drawn_token_comes_with_the_law_it_was_drawn_from(sampling):
    """That of its parent without the siblings before it; never more children than the law has tokens."""
    drafter, reader = TreeDrafter(draft_model(), sampling, 14), draft_model()
    tokens, siblings = random_prompt(12, 2, VOCAB), 0
    for turn in range(10):
        draft = drafter.propose(tokens, upto(3))
        assert draft.probs.shape == (len(draft.tokens), VOCAB)
        drawn: dict[int, list[int]] = {}
        for path, parent, token, law in zip(paths(draft), draft.parents, draft.tokens, draft.probs, strict=True):
            logits = reader.prefill([*tokens, *path[:-1]])
            expected = distribution(logits[None], sampling.temperature, sampling.top_k, sampling.top_p)[0]
            earlier = drawn.setdefault(parent, [])
            siblings += bool(earlier)
            expected[earlier] = 0
            torch.testing.assert_close(law, expected / expected.sum(), atol=1e-4, rtol=1e-2)
            assert law[token] > 0
            earlier.append(token)
        tokens = [*tokens, *paths(draft)[turn % len(draft.tokens)], turn]
    assert siblings > 20


def test_draft_and_target_draw_from_different_streams():
    """A shared stream would tie the decision about a token to its drawing: not lossless."""
    params, flat = SamplingParams(temperature=1.0, seed=4), torch.full((40, 64), 1 / 64)
    streams = params.generator("target"), TreeDrafter(draft_model(), params, 5)._generator
    ours, theirs = (torch.multinomial(flat, 1, generator=stream).tolist() for stream in streams)
    assert ours != theirs


def test_the_threshold_follows_what_trees_need():
    """It falls while trees are not full, within bounds, and rises while likely places are left out."""
    tokens = random_prompt(12, 2, VOCAB)
    starved = TreeDrafter(draft_model(), SamplingParams(temperature=1.0, top_k=2), 31)
    crowded = TreeDrafter(draft_model(), SamplingParams(temperature=1.0), 3)
    crowded._threshold = 0.001
    for turn in range(60):
        size = len(starved.propose(tokens, upto(2)).tokens)
        assert size <= 6  # all there are
        assert len(crowded.propose(tokens, upto(6)).tokens) == 3
        tokens = [*tokens, turn % VOCAB]
    assert starved._threshold == 0.01 / 31 and size == 6
    assert 0.03 < crowded._threshold <= 1


# ------------------------------------------------------------------------------------------------ the draft's cache
ROWS = 8  # of a draft that pads, hence its max_rows, so that catching up takes several chunks


class Forgetful(SpyLlama):
    """Keeps at most two rows of a tree, as a cache might that cannot move them."""

    def keep(self, position, rows):
        return super().keep(position, rows[:2])


def growth(draft, rng) -> list[int]:
    """How a text might go on after a draft: down the tree or beside it, a long way or none."""
    down = rng.choice([(), *paths(draft)])[: rng.randint(0, 6)]
    plain = rng.choice([1, 1, 1, 1, 2, ROWS - 1, ROWS, 3 * ROWS])
    return [*down, *(rng.randrange(VOCAB) for _ in range(plain))]


@pytest.mark.parametrize("kind", [SpyLlama, Forgetful])
@pytest.mark.parametrize("fixed_rows", [None, ROWS])
def test_whatever_came_before_trees_are_those_of_a_fresh_drafter(kind, fixed_rows):
    for seed in range(4):
        rng = random.Random(seed)
        model, fresh = (draft_model(seed, fixed_rows=fixed_rows) for _ in range(2))
        model.__class__ = kind
        used, tokens = TreeDrafter(model, GREEDY, 12), random_prompt(rng.randint(1, 20), seed, VOCAB)
        while len(tokens) < 300:
            depth = rng.randint(0, 5)  # 0: the round is another drafter's
            draft = used.propose(tokens, upto(depth))
            expected = TreeDrafter(fresh, GREEDY, 12).propose(tokens, upto(depth))
            assert dict(zip(paths(draft), draft.path_probs, strict=True)) == pytest.approx(
                dict(zip(paths(expected), expected.path_probs, strict=True)), rel=1e-3
            )
            if draft.tokens:
                used.observe(0)
            tokens = [*tokens, *growth(draft, rng)]


def fed(model):
    return [(rows, position) for method, rows, position in model.calls if method == "forward"]


def test_no_kept_token_is_fed_again():
    """What only the last level has was never fed; all else that was kept is there, and one token is new."""
    model, news = draft_model(), Counter()
    drafter, tokens = TreeDrafter(model, GREEDY, 8), random_prompt(10, 6, VOCAB)
    draft = drafter.propose(tokens, upto(4))
    for turn in range(16):
        path = sorted(paths(draft), key=len)[-1 - turn % 5]
        tokens = [*tokens, *path, turn]
        parents = {above for above in paths(draft) if any(below[:-1] == above for below in paths(draft))}
        model.calls.clear()
        draft = drafter.propose(tokens, upto(4))
        new = len(tokens) - fed(model)[0][1]
        assert fed(model)[0][0] == new
        assert new == 1 if path in parents else new <= 2
        assert new == 2 if len(path) == 4 else True
        news[new] += 1
    assert min(news[1], news[2]) > 3, news


def test_the_prompt_is_read_once_and_long_stretches_in_chunks():
    model = draft_model(fixed_rows=ROWS)
    drafter = TreeDrafter(model, GREEDY, 1)
    drafter.propose([1, 2], upto(1))
    assert model.calls == [("prefill", 1, 0), ("forward", 1, 1)]
    model.calls.clear()
    drafter.propose([1, 2, *range(3, 3 + 2 * ROWS + 3)], upto(1))
    assert model.calls == [("greedy", ROWS, 2), ("greedy", ROWS, 2 + ROWS), ("forward", 3, 2 + 2 * ROWS)]


def test_no_step_is_made_that_could_add_nothing():
    model = draft_model()
    TreeDrafter(model, GREEDY, 1).propose([1, 2, 3], upto(6))
    assert len(fed(model)) == 1
    model.calls.clear()
    TreeDrafter(model, WARM, 1).propose([1, 2, 3], upto(6))
    assert len(fed(model)) == 1
    model.calls.clear()
    assert TreeDrafter(model, GREEDY, 5).propose([1, 2, 3], upto(0)).tokens == []
    assert model.calls == []


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0)], ids=["greedy", "sampled"])
def test_a_full_draft_context_flattens_the_tree_then_ends_it(sampling):
    drafter = TreeDrafter(draft_model(max_seq_len=20), sampling, 31)
    for length, expected in ((17, 4), (19, 2), (20, 1), (21, 0), (40, 0)):
        draft = drafter.propose(random_prompt(length, 1, VOCAB), upto(5))
        assert levels(draft) == expected


def test_a_tree_takes_no_more_rows_than_the_draft_has():
    for rows in (1, 2, 5):
        for sampling in (GREEDY, SamplingParams(temperature=1.0)):
            draft = TreeDrafter(draft_model(fixed_rows=rows), sampling, 20).propose([1, 2], upto(8))
            assert levels(draft) <= rows
            assert len(set(draft.parents)) <= rows  # the text's last token and those that were fed


# --------------------------------------------------------------------------------------------------------- prices
def priced(depth, pays):
    """(a limit, what it was asked)"""
    asked = []

    def noted(*question):
        asked.append(question)
        return pays(*question)

    return Limit(lambda source: depth, noted), asked


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_it_stops_where_a_further_token_does_not_pay(sampling):
    model, tokens = draft_model(), random_prompt(12, 2, VOCAB)

    def propose(pays, nodes=12, depth=4):
        limit, asked = priced(depth, pays)
        model.calls.clear()
        return TreeDrafter(model, sampling, nodes).propose(tokens, limit), asked

    nothing, asked = propose(lambda *question: False)
    assert len(nothing.tokens) == 1, "it was asked for a draft"
    assert len(fed(model)) == 1
    few, _ = propose(lambda source, reach, steps, rows: rows <= 4)
    assert len(few.tokens) == 3
    flat, _ = propose(lambda source, reach, steps, rows: not steps)
    assert levels(flat) == 1
    assert len(fed(model)) == 1
    likely, asked = propose(lambda source, reach, steps, rows: reach > 0.1)
    everything, all_asked = propose(lambda *question: True)
    assert 1 < len(likely.tokens) < len(everything.tokens) == 12
    assert {source for source, *_ in asked + all_asked} == {"tree"}
    rows = [rows for _, _, steps, rows in all_asked if not steps]
    assert rows == list(range(3, 14)), "for each token its row: the text's last one has the first"


def test_what_is_asked_about_greedy_trees():
    """Tokens in the order of their reach; a level by the reach of those before it, less what has to leave for it."""
    model, tokens = draft_model(), random_prompt(12, 2, VOCAB)
    limit, asked = priced(3, lambda *question: True)
    draft = TreeDrafter(model, GREEDY, 31).propose(tokens, limit)
    assert [reach for _, reach, steps, _ in asked if not steps] == sorted(draft.path_probs, reverse=True)[1:]
    first = sorted(reach for reach, parent in zip(draft.path_probs, draft.parents, strict=True) if parent == -1)
    levels_asked = [question for question in asked if question[2]]
    assert len(levels_asked) == 2
    # The first level has as many as there may be, and room for all their children.
    assert levels_asked[0][1:] == (pytest.approx(sum(first[-FRONTIER:])), 1, 2 + WIDTH)
    limit, asked = priced(2, lambda *question: True)
    TreeDrafter(model, GREEDY, 4).propose(tokens, limit)
    first = first[-4:]  # the pool is full: a child of the likeliest would push out the least likely, and so on
    assert asked[0][1:] == (pytest.approx(first[3] - first[0] + first[2] - first[1]), 1, 5)


# ---------------------------------------------------------------------------------------------------------- texts
def tree_text(target, draft, prompt, nodes, depth, controller=None, **options):
    """(ids, stats) of a generation with trees."""
    stats = GenerationStats()
    drafter = TreeDrafter(draft, options.get("sampling", GREEDY), nodes)
    controller = controller or FixedDraftLength(depth)
    tokens = generate(target, drafter, prompt, controller=controller, stats=stats, **options)
    return [token.id for token in tokens], stats


SIZES = [(1, 1), (1, 6), (2, 3), (4, 2), (6, 4), (11, 5), (15, 1), (31, 8)]


@pytest.mark.parametrize("noise", [0.0, 0.07, 0.2, None])
def test_greedy_text_with_trees_equals_plain_greedy(noise):
    """4 kinds of draft x 4 models x 3 prompts x 8 trees = 384 cases; every other model ends at its context."""
    accepted, siblings, reasons = Counter(), 0, Counter()
    for seed in range(4):
        vocab_size = (6, 12, VOCAB, 64)[seed]
        target, draft = build_pair(seed, noise, vocab_size, max_seq_len=(64, 128)[seed % 2])
        for number, length in enumerate((1, 9, 45)):
            prompt = random_prompt(length, 10 * seed + number, vocab_size)
            options = {"max_new_tokens": (30, 1000)[number == 2 and seed % 2 == 0]}
            if number == 1:
                options["stop_ids"] = {plain(target, prompt, max_new_tokens=16)[-1]}
            expected = plain(target, prompt, **options)
            for nodes, depth in SIZES:
                ids, stats = tree_text(target, draft, prompt, nodes, depth, **options)
                assert ids == expected, (seed, length, nodes, depth)
                reasons[stats.finish_reason] += 1
                for r in stats.rounds:
                    accepted[r.accepted] += 1
                    siblings += any(r.parents[i] in r.parents[:i] for i in r.kept)
    assert min(reasons[reason] for reason in ("stop", "length", "context")) >= 16
    if noise != 0:
        assert min(accepted[0], accepted[1]) > 50 and (siblings > 50)
    if noise is not None:
        assert max(accepted) >= 4


@pytest.mark.parametrize("fixed_rows", [None, 12])
def test_greedy_text_at_the_end_of_either_context_and_over_padding(fixed_rows):
    deepest = 0
    for seed in range(6):
        target = build_pair(seed, 0.1, VOCAB, max_seq_len=96, fixed_rows=fixed_rows)[0]
        draft = build_pair(seed, 0.1, VOCAB, max_seq_len=(40, 96)[seed % 2])[1]
        prompt = random_prompt(8, seed, VOCAB)
        ids, stats = tree_text(target, draft, prompt, 11, 5, max_new_tokens=1000)
        assert ids == plain(target, prompt, max_new_tokens=1000)
        assert len(prompt) + len(ids) == 96 and stats.finish_reason == "context"
        left = [r for r in stats.rounds[-20:] if r.drafted]
        assert bool(left) == (seed % 2 == 1), "the draft's context ends long before the target's, or with it"
        deepest = max(deepest, *(r.accepted for r in stats.rounds))
    assert deepest > 2


def test_greedy_text_with_copies_between_trees():
    sources = Counter()
    for seed in range(8):
        target, draft = build_pair(seed, (0.07, 0.2)[seed % 2], 12)
        prompt = random_prompt(20, seed, 12)
        stats = GenerationStats()
        drafter = Combined(PromptLookup(), TreeDrafter(draft, GREEDY, 7))
        tokens = generate(target, drafter, prompt, controller=FixedDraftLength(3), max_new_tokens=60, stats=stats)
        assert [token.id for token in tokens] == plain(target, prompt, max_new_tokens=60)
        turns = [r.source for r in stats.rounds if r.drafted]
        sources.update(zip(turns, turns[1:], strict=False))
    assert sources["tree", "tree"] > 5 and sum(n for (a, b), n in sources.items() if a != "tree" and b == "tree") > 5


def test_greedy_text_with_a_price_on_every_token():
    for seed in range(6):
        target, draft = build_pair(seed, 0.1, VOCAB)
        prompt, controller = random_prompt(20, seed, VOCAB), AutoDraftLength()
        for _ in range(2):
            ids, stats = tree_text(target, draft, prompt, 12, 6, controller, max_new_tokens=50)
            assert ids == plain(target, prompt, max_new_tokens=50)
            assert all(r.depth <= 6 and r.drafted <= 12 for r in stats.rounds)


def test_equal_seeds_give_equal_texts_and_others_differ():
    target, draft = build_pair(2, 0.1)
    prompt = random_prompt(5, 1)
    for params in ({"temperature": 0.8}, {"temperature": 1.2, "top_k": 10, "top_p": 0.8}):

        def texts(params=params):
            for seed in range(4):
                yield tuple(tree_text(target, draft, prompt, 7, 4, sampling=SamplingParams(**params, seed=seed),
                                      max_new_tokens=24)[0])  # fmt: skip

        once = list(texts())
        assert once == list(texts())
        assert len(set(once)) == 4


def rounds_of(text):
    return len(text[-1].rounds)


def test_trees_take_fewer_verifications_than_chains_of_equal_depth():
    """Greedy text is the same, so that fewer rounds are more accepted tokens in each."""
    for depth, nodes in ((2, 4), (4, 8), (4, 15)):
        chains = trees = 0
        for seed in range(8):
            target, draft = build_pair(seed, (0.1, 0.2)[seed % 2], 32)
            prompt = random_prompt(12, seed, 32)
            chains += rounds_of(speculate(target, draft, prompt, depth, max_new_tokens=60))
            trees += rounds_of(tree_text(target, draft, prompt, nodes, depth, max_new_tokens=60))
        assert trees < 0.95 * chains


def test_the_embedded_pair_accepts_more_with_trees():
    opened = [open_model(str(CHECKPOINTS / name)) for name in ("tiny-target", "tiny-draft")]
    target, draft = (load_model(each, dtype="fp32", max_seq_len=256).model for each in opened)
    prompts = [opened[0].tokenizer.encode(text) for text in PROMPTS.read_text().split("\n---\n")[:3]]
    for depth, sizes in ((4, (6, 11)), (5, (15,))):
        chains = [speculate(target, draft, prompt, depth, max_new_tokens=60) for prompt in prompts]
        before = sum(map(rounds_of, chains))
        for nodes in sizes:
            trees = [tree_text(target, draft, prompt, nodes, depth, max_new_tokens=60) for prompt in prompts]
            assert [text[0] for text in trees] == [text[0] for text in chains]
            after = sum(map(rounds_of, trees))
            assert after < before, (depth, nodes)
            before = after


@pytest.mark.parametrize("nodes", [-1, 0, 32])
def test_sizes_that_no_verification_holds_are_refused(nodes):
    with pytest.raises(UserError, match=f"a tree of {nodes} tokens: must be between 1 and 31"):
        TreeDrafter(draft_model(), GREEDY, nodes)


class InPlace(SpyLlama):
    """Keeps, as a board does, only the rows of a tree that lie where the sequence wants them."""

    def keep(self, position, rows):
        return next((i for i, row in enumerate(rows) if row != i), len(rows))


@pytest.mark.parametrize("nodes", [29, 30, 31])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0.8)], ids=["greedy", "sampled"])
def test_a_large_tree_leaves_room_for_the_tokens_that_are_fed_again(nodes, params):
    config = engine_config(VOCAB)
    tensors = random_tensors(config, 3)
    target, draft = (
        InPlace(config, each, dtype="fp32", max_seq_len=128) for each in (tensors, perturbed(tensors, 0.1, 4))
    )
    fed, stats = [], GenerationStats()
    check = target._check_tree
    target._check_tree = lambda position, parents: (fed.append(len(parents)), check(position, parents))
    drafter = TreeDrafter(draft, params, nodes)
    controller, options = FixedDraftLength(8), {"max_new_tokens": 90, "sampling": params, "stats": stats}
    ids = [token.id for token in generate(target, drafter, [1, 2, 3], controller=controller, **options)]
    assert len(ids) == 90 and max(fed) == 32
    if params.greedy:
        assert ids == plain(target, [1, 2, 3], max_new_tokens=90)
