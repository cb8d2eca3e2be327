"""Several users on a board: each one's rows are what they are alone, whoever is beside them, and so are the pages."""

import random

import pytest
import torch

from models.board_mock import cluster
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters import Draft, PerSequence
from models.speculative.drafters.combined import Combined
from models.speculative.drafters.model import ModelDrafter
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.engine import Engine
from models.speculative.model import IDS, LOGITS, Rows
from models.speculative.sequence import Request
from models.tests.engine_fixtures import perturbed
from models.tests.ttnn.model_fixtures import Weights, cached, on_chips, random_ids, reduced
from models.ttnn_llama.batch_model import BatchLlama
from models.ttnn_llama.modules.batch_rows import Share, _turns
from models.ttnn_llama.shapes import KV_BLOCK
from models.ttnn_llama.weights.precision import precision_named
from models.ttnn_llama.weights.tensors import CheckpointSource

CONTEXT = 352


@pytest.fixture(scope="module")
def weights(mesh):
    return Weights.random(reduced("1B", mesh.get_num_devices(), layers=1))


def batch_of(weights, mesh, slots, precision="bf16", **options):
    """The model of these weights, of several slots."""
    named = precision_named(precision)
    source = CheckpointSource(weights, mesh, named)
    options = {"max_seq_len": CONTEXT} | options
    return BatchLlama(weights.config, mesh, source, precision=named, slots=slots, **options)


@pytest.fixture(scope="module")
def single(mesh, weights):
    """The same weights for one sequence, with a flat cache."""
    return weights.on(mesh, "accuracy", CONTEXT)


@pytest.fixture(scope="module")
def model(mesh, weights):
    """Four slots, with a bfp8 cache."""
    return batch_of(weights, mesh, 4, "accuracy")


@pytest.fixture(autouse=True)
def empty(request):
    """No text is under way when a test begins."""
    if "model" in request.fixturenames:
        model = request.getfixturevalue("model")
        for slot in range(model.slots):
            model.free(slot)


def of_user(model, slot, length):
    """What the pages of a slot hold: [layers, 2, KV, length, D], chips joined, as `cached` gives a flat cache's."""
    pages = list(model.pages.of(slot))
    layers = [(layer.keys, layer.values) for layer in model.cache]
    whole = torch.stack([torch.stack([torch.cat(on_chips(kept), 1).float() for kept in pair]) for pair in layers])
    return whole[:, :, pages].transpose(2, 3).flatten(3, 4)[..., :length, :]


# ---------------------------------------------------------------------------------------- rows, whoever is beside them
def test_rows_of_four_users_are_what_each_is_alone_bit_for_bit(single, model):
    """Also as the model of one sequence computes them, in a flat cache, which holds what the pages hold: prompts, rows
    over the border of a tile and of a page, drafted chains; in whatever order users come, with one that is absent."""
    texts = [random_ids(length, seed=length) for length in (68, 130, 200, 36)]  # 8 rows more: over 128, over 192
    rows = [Rows(i, text[-8:], len(text) - 8) for i, text in enumerate(texts)]
    alone, kept, chains = [], [], []
    for text in texts:
        logits = single.prefill(text[:-8])
        alone.append((logits, single.forward(text[-8:], len(text) - 8)))
        kept.append(cached(single)[..., : len(text), :])
        chains.append(single.draft_greedy(text[-2:], len(text) - 2, 3))
    for i in (2, 0, 3, 1):
        assert torch.equal(model.slot(i).prefill(texts[i][:-8]), alone[i][0])
    step = model.extend(rows, LOGITS)
    for i, text in enumerate(texts):
        assert torch.equal(step.logits(i), alone[i][1])
        assert torch.equal(of_user(model, i, len(text)), kept[i])
    ids = [logits.argmax(-1).tolist() for _, logits in alone]
    assert model.extend([rows[3], rows[0], rows[2]], IDS).ids() == [ids[3], ids[0], ids[2]]
    assert [model.slot(i).draft_greedy(text[-2:], len(text) - 2, 3) for i, text in enumerate(texts)] == chains


def test_users_have_rows_of_any_number(model):
    """Ragged, one a single step and one a longer verification, as the engine asks while drafts end at stops; rows
    beyond 32 take a second forward."""
    texts = [random_ids(60 + 20 * i, seed=i) for i in range(4)]
    alone = []
    for i, text in enumerate(texts):
        model.slot(i).prefill(text[:30])
        alone.append(model.slot(i).forward(text[30:50], 30))
    for counts in ((1, 5, 3, 1), (20, 2, 0, 11), (0, 17, 16, 0)):
        rows = [Rows(i, texts[i][30 : 30 + n], 30) for i, n in enumerate(counts) if n]
        step = model.extend(rows, LOGITS)
        for place, each in enumerate(rows):
            assert torch.equal(step.logits(place), alone[each.slot][: len(each.tokens)])


def test_a_text_in_a_batch_of_four_is_its_text_alone(mesh, weights, model):
    """Through the engine, with drafts of a model that agrees now and then, and with copies."""
    draft = batch_of(Weights(weights.config, perturbed(weights, 0.1, seed=5)), mesh, 4, "accuracy")
    prompts = [random_ids(5 + 12 * i, seed=20 + i) for i in range(4)]

    def drafter(sequence):
        own = ModelDrafter(draft.slot(sequence.slot), sequence.request.sampling, confident=False)
        return Combined(PromptLookup(), own) if sequence.slot % 2 else own

    def texts(numbers, drafters):
        engine = Engine(model)
        requests = [
            Request(prompts[i], max_new_tokens=6 + i, drafter=drafters, controller=FixedDraftLength(3)) for i in numbers
        ]
        sequences = [engine.add(request) for request in requests]
        while not engine.idle:
            engine.step()
        assert all(sequence.error is None for sequence in sequences)
        rounds = [round_ for sequence in sequences for round_ in sequence.stats.rounds]
        return [sequence.tokens for sequence in sequences], rounds

    together, rounds = texts(range(4), PerSequence(drafter))
    plain = [texts([i], None)[0][0] for i in range(4)]
    assert together == plain
    assert sum(round_.accepted for round_ in rounds) > 0
    assert any(round_.accepted < round_.drafted for round_ in rounds)
    assert model.pages.free_count == model.pages.count


def test_four_texts_with_long_drafts_take_turns_of_32_rows(mesh, weights, model, monkeypatch):
    """8 rows a text more than a tile has: two forwards a step, each of at most 32 rows, and the same texts."""
    assert model.limits.batch_rows == 32
    prompts = [(random_ids(6, seed=70 + i) * 4)[: 20 + i] for i in range(4)]

    def texts(drafter):
        engine = Engine(model)
        requests = [Request(p, max_new_tokens=14, drafter=drafter, controller=FixedDraftLength(9)) for p in prompts]
        sequences = [engine.add(request) for request in requests]
        while not engine.idle:
            engine.step()
        assert [sequence.error for sequence in sequences] == [None] * 4
        return [sequence.tokens for sequence in sequences]

    known = dict(zip(map(tuple, prompts), texts(None), strict=True))

    class Knowing(PromptLookup):
        """Drafts what will follow."""

        def propose(self, tokens, limit):
            text = next(text for prompt, text in known.items() if tuple(tokens[: len(prompt)]) == prompt)
            return Draft(text[len(tokens) : len(tokens) + limit("lookup")], source="lookup")

    forwards = []
    run = model.run
    monkeypatch.setattr(model, "run", lambda what, users: forwards.append(users) or run(what, users))
    assert texts(PerSequence(lambda sequence: Knowing())) == list(known.values())
    rows = [sum(len(each.tokens) for each in users) for users in forwards]
    assert 30 in rows and max(rows) <= 32


# ------------------------------------------------------------------------------------------------------ row-safe writes
def test_a_forward_writes_its_users_rows_and_nothing_else(model):
    """Rows of one tile of one user take turns; everything that was in the cache before is there after."""
    texts = [random_ids(80, seed=i) for i in range(4)]
    for i, text in enumerate(texts):
        model.slot(i).prefill(text)
    before = [of_user(model, i, KV_BLOCK) for i in range(4)]
    rows = [Rows(i, random_ids(n, seed=40 + i), position) for i, n, position in ((0, 8, 28), (2, 3, 64), (3, 1, 95))]
    model.extend(rows)
    after = [of_user(model, i, KV_BLOCK) for i in range(4)]
    assert torch.equal(after[1], before[1])
    for each in rows:
        written = slice(each.position, each.position + len(each.tokens))
        assert not (after[each.slot][..., written, :] == before[each.slot][..., written, :]).flatten(-1).all(-1).any()
        after[each.slot][..., written, :] = before[each.slot][..., written, :]
        assert torch.equal(after[each.slot], before[each.slot])
    for each in rows:  # one after the other, as single decodes write them
        for i, token in enumerate(each.tokens):
            model.slot(each.slot).greedy([token], each.position + i)
    single = [of_user(model, i, KV_BLOCK) for i in range(4)]
    model.extend(rows)
    assert all(torch.equal(of_user(model, i, KV_BLOCK), single[i]) for i in range(4))


def test_users_that_share_a_page_are_found(mesh, weights, model, monkeypatch):
    """By the inputs, before anything reaches the device; and without them by what a shared page comes to hold."""
    texts = [random_ids(40, seed=i) for i in range(2)]
    for i, text in enumerate(texts):
        model.slot(i).prefill(text)
    rows = [Rows(i, random_ids(4, seed=8 + i), 40) for i in range(2)]
    model.extend(rows)
    alone = of_user(model, 0, 44)
    model.pages._owned[1] = model.pages._owned[0]
    with pytest.raises(ValueError, match=r"written into a tile of page \d+ together with another user's"):
        model.extend(rows)
    if cluster.is_mock():
        monkeypatch.setattr("models.ttnn_llama.modules.batch_rows._turns", unchecked_turns)
        with pytest.raises(ValueError, match="into a tile that another row writes into too"):
            model.extend(rows)
    model.pages._owned[1] = [model.pages._free.pop()]
    monkeypatch.undo()
    model.slot(0).forward(rows[0].tokens, 40)
    assert torch.equal(of_user(model, 0, 44), alone)


def unchecked_turns(places, count):
    """What `_turns` gives, without its check."""
    return [[position if which == turn else -1 for position, which, _ in places] for turn in range(count)]


def test_rows_of_one_user_in_one_turn_are_found(mesh, weights, model):
    inputs = model.new_inputs(8, 2)
    with pytest.raises(ValueError, match="3 rows of one user in a program of 2 turns"):
        inputs.fill_shares([Share([1, 2], 5, [0]), Share([1, 2, 3], 9, [1])])
    with pytest.raises(ValueError, match="9 rows in a program of 8"):
        inputs.fill_shares([Share([1], 5, [i]) for i in range(9)])


def test_a_forward_at_rest_writes_nothing(model):
    """What a program is compiled with while texts are under way."""
    model.slot(1).prefill(random_ids(100, seed=3))
    model.slot(0).draft_greedy(random_ids(2, seed=4), 0, 3)
    model.extend([Rows(0, [1, 2], 3), Rows(1, [1], 100)])
    before = [torch.cat(on_chips(kept), 1) for layer in model.cache for kept in (layer.keys, layer.values)]
    model.rest()
    model.runner.compile()
    model.warm_up(140)
    after = [torch.cat(on_chips(kept), 1) for layer in model.cache for kept in (layer.keys, layer.values)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_random_company_finds_its_inputs():
    """A turn never holds two rows of one tile, every row has one turn, whoever shares a forward."""
    draw = random.Random(1)
    for _ in range(300):
        users = draw.randint(1, 8)
        places, page = [], 0
        for _ in range(users):
            position, n = draw.randrange(500), draw.randint(1, 32 // users)
            pages = list(range(page, page + 5))
            page += 5
            places += [(position + i, i, pages) for i in range(n)]
        turns = _turns(places, max(which for _, which, _ in places) + 1)
        assert [sorted(p for p in row if p >= 0) for row in zip(*turns, strict=True)] == [[p] for p, _, _ in places]
        for turn in turns:
            tiles = [
                (pages[p // KV_BLOCK], p % KV_BLOCK // 32)
                for p, (_, _, pages) in zip(turn, places, strict=True)
                if p >= 0
            ]
            assert len(set(tiles)) == len(tiles)
