"""Chains that compiled layers draft in one call, against the same ones step by step."""

import math

import pytest
import torch

pytest.importorskip("llvmlite")

from models.speculative.acceptance import distribution
from models.speculative.drafters import Limit
from models.speculative.drafters.in_step import alone
from models.speculative.drafters.model import ModelDrafter
from models.speculative.model import Draws
from models.speculative.sampling import SamplingParams
from models.tests.engine_fixtures import random_prompt
from models.tests.llama_fixtures import random_tensors, tiny_config
from models.tests.test_compiled_head import SIZES, SWITCHES, heads_of, states_of
from models.torch_llama.model import TorchLlama

GREEDY = SamplingParams()
STEPS = 5


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def model_of(dtype="fp32", layers=2, vocabulary=100, slots=1, change=None, **options):
    sizes = dict(hidden_size=80, intermediate_size=200, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    config = tiny_config(**sizes, num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=512)
    tensors = {name: tensor * 2 for name, tensor in random_tensors(config, 3).items()}  # no flat distributions
    if change:
        change(tensors)
    stored = "bf16" if dtype == "int8" else dtype
    quantize = "int8" if dtype == "int8" else None
    return TorchLlama(
        config, tensors, dtype=stored, quantize=quantize, compiled=True, max_seq_len=300, slots=slots, **options
    )


def step_by_step(model, tokens, position, steps):
    """(ids, path probabilities, the logits of the last step) of a chain that asks for logits."""
    ids, chances, chance = [], [], 1.0
    for _ in range(steps):
        logits = model.forward(tokens, position)[-1:]
        position, best = position + len(tokens), torch.softmax(logits, -1, dtype=torch.float32).max(-1)
        chance *= best.values.item()
        place = best.indices.item()
        tokens = [place if getattr(model, "target_ids", None) is None else int(model.target_ids[place])]
        ids, chances = ids + tokens, [*chances, chance]
    return ids, chances, logits


def same(model, tokens, position, begin):
    """That a chain is the same both ways, and leaves keys and values behind it that are the same."""
    begin()
    ids, chances, _ = step_by_step(model, tokens, position, STEPS)
    begin()
    chain = model.draft_while(tokens, position, [0.0] * STEPS)
    assert chain.ids == ids
    torch.testing.assert_close(torch.tensor(chain.chances), torch.tensor(chances), atol=1e-6, rtol=1e-5)
    return ids


# ----------------------------------------------------------------------------------------------------------- heads
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_heads_chain_is_that_of_its_steps(size, switches, dtype):
    _, head = heads_of(size, "fp32" if dtype == "int8" else dtype, "int8" if dtype == "int8" else None, **switches)
    prompt = random_prompt(126, 1)  # the chain goes over the end of a block

    for fed in (1, 2, 7):
        first = len(prompt) - fed

        def begin(first=first):
            head.free(0)
            head.states(states_of(head, len(prompt) - 1), range(len(prompt) - 1), 0)
            head.prefill(prompt[:first])

        ids = same(head, prompt[first:], first, begin)
        # What the chain has left: its last row's state, from which a further step goes on, and its keys and values.
        after = head.forward(ids[-1:], len(prompt) + STEPS - 1)
        begin()
        step_by_step(head, prompt[first:], first, STEPS)
        assert torch.equal(after, head.forward(ids[-1:], len(prompt) + STEPS - 1))
        # A tree's first rows join that state too.
        begin()
        head.draft_while(prompt[first:], first, [2.0])
        after = head.forward([3, 4], len(prompt) - 1, [-1, 0, 0])
        begin()
        head.forward(prompt[first:], first)
        assert torch.equal(after, head.forward([3, 4], len(prompt) - 1, [-1, 0, 0]))


def test_a_reduced_vocabulary_is_told_in_ids_of_the_text():
    _, head = heads_of(SIZES[0])
    assert head.target_ids is not None and not torch.equal(head.target_ids, torch.arange(len(head.target_ids)))
    prompt = random_prompt(20, 2)
    head.states(states_of(head, len(prompt) - 1), range(len(prompt) - 1), 0)
    ids = head.draft_while(prompt[1:], 1, [0.0] * STEPS).ids
    assert set(ids) <= set(head.target_ids.tolist())
    assert ids == head.draft_greedy(prompt[1:], 1, STEPS)


# ---------------------------------------------------------------------------------------------------------- models
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_models_chain_is_that_of_its_steps(dtype, layers, threads):
    model = model_of(dtype, layers)
    prompt = random_prompt(125, 4)
    for fed in (1, 5, 20):
        first = len(prompt) - fed

        def begin(first=first):
            model.free(0)
            model.prefill(prompt[:first])

        ids = same(model, prompt[first:], first, begin)
        after = model.forward(ids[-1:], len(prompt) + STEPS - 1)
        begin()
        step_by_step(model, prompt[first:], first, STEPS)
        assert torch.equal(after, model.forward(ids[-1:], len(prompt) + STEPS - 1))


def test_slots_whose_blocks_lie_apart_chain_like_one():
    model, alone = model_of(slots=3), model_of()
    texts = [random_prompt(length, length) for length in (120, 250, 126)]
    for end in (100, 200, 300):  # blocks are taken in turn
        for slot, text in enumerate(texts):
            if text[end - 100 : end]:
                model.slot(slot).prefill(text[:end])
    for slot, text in enumerate(texts):
        alone.free(0)
        alone.prefill(text[:-2])
        expected = alone.draft_while(text[-2:], len(text) - 2, [0.0] * STEPS)
        assert model.slot(slot).draft_while(text[-2:], len(text) - 2, [0.0] * STEPS) == expected


def test_a_beginning_that_a_chain_wrote_is_shared():
    model, fresh = model_of(slots=2), model_of()
    text = random_prompt(120, 6)
    model.prefill(text[:-1])
    text += model.draft_while(text[-1:], 119, [0.0] * 12).ids
    assert model.reserve(1, text, 200) == 128
    fresh.prefill(text[:-1])
    expected = fresh.forward(text[-1:], 131)
    model.slot(1).forward(text[128:-1], 128)
    assert torch.equal(model.slot(1).forward(text[-1:], 131), expected)


# --------------------------------------------------------------------------------------------------------- drawing
WORDS = [2**63 + 12345, 7 << 58, 0, 2**64 - 1, 3**40 % 2**64]  # of 64 bits each


def drawn_by_steps(model, tokens, position, temperature):
    """(ids, laws) of a chain that asks for logits, and for a token drawn from them."""
    ids, laws = [], []
    for word in WORDS:
        logits = model.forward(tokens, position)[-1:]
        position, drawn = position + len(tokens), model.draw(logits, Draws(temperature, [word]))
        ids, laws, tokens = ids + drawn.ids, [*laws, drawn.laws], drawn.ids
    return ids, torch.cat(laws)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_models_drawn_chain_is_that_of_its_steps(dtype, temperature, threads):
    model = model_of(dtype)
    prompt = random_prompt(125, 4)
    for first in (124, 110):
        model.prefill(prompt[:first])
        ids, laws = drawn_by_steps(model, prompt[first:], first, temperature)
        chain = model.draft_while(prompt[first:], first, [0.0] * STEPS, Draws(temperature, WORDS))
        assert chain.ids == ids and torch.equal(chain.laws, laws)


def test_a_heads_drawn_chain_is_that_of_its_steps_in_ids_of_the_text():
    _, head = heads_of(SIZES[0])
    prompt = random_prompt(20, 2)

    def begin():
        head.free(0)
        head.states(states_of(head, len(prompt) - 1), range(len(prompt) - 1), 0)

    begin()
    chain = head.draft_while(prompt[1:], 1, [0.0] * STEPS, Draws(0.9, WORDS))
    begin()
    ids, laws = drawn_by_steps(head, prompt[1:], 1, 0.9)
    assert chain.ids == ids and torch.equal(chain.laws, laws)
    assert laws.shape[1] == head.target_vocab_size
    assert set(laws.sum(0).nonzero().flatten().tolist()) <= set(head.target_ids.tolist())
    assert all(law[id] > 0 for id, law in zip(ids, laws, strict=True))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 20.0])
def test_every_id_is_drawn_as_often_as_its_law_says(temperature):
    model, tries = model_of(vocabulary=50), 4000
    logits = model.prefill([1, 2, 3])[None]
    law = torch.softmax(logits / temperature, -1)[0]
    counts = torch.zeros(50)
    for i in range(tries):
        drawn = model.draw(logits, Draws(temperature, [(2 * i + 1) * 2**63 // tries]))
        counts[drawn.ids[0]] += 1
    assert (counts - tries * drawn.laws[0]).abs().max() <= 1
    torch.testing.assert_close(drawn.laws[0], law, atol=1e-6, rtol=1e-5)
    assert drawn.chances == pytest.approx([law.max().item()], rel=1e-5)


@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (7, 1.0), (0, 1e-6), (0, 0.6), (0, 0.95), (9, 0.5), (10**6, 1.0)])
def test_a_law_leaves_out_what_is_less_likely_than_top_k_and_top_p_keep(top_k, top_p):
    model, left_out = model_of(vocabulary=300), 0
    for seed in range(20):
        logits = model.prefill(random_prompt(5, seed))[None]
        whole = torch.softmax(logits / 0.8, -1)[0]
        law = model.draw(logits, Draws(0.8, [seed << 58], top_k, top_p)).laws[0]
        kept = distribution(logits, 0.8, top_k, top_p)[0] > 0
        assert (law[kept & (whole > 1e-9)] > 0).all()
        least = whole[kept].min()
        if not top_k or top_p == 1:  # of both the wider one
            assert (law[whole < 0.499 * least] == 0).all()
        torch.testing.assert_close(law[law > 0], whole[law > 0] / whole[law > 0].sum(), atol=1e-6, rtol=1e-4)
        left_out += int((law == 0).sum())
    assert left_out > 0 or top_k > 300


def test_what_cannot_be_drawn_never_is():
    model = model_of(vocabulary=40)
    logits = torch.full((1, 40), -math.inf)
    logits[0, [7, 21]] = torch.tensor([1.0, 0.0])
    seen = {model.draw(logits, Draws(1.0, [word])).ids[0] for word in (0, 1, 2**62, 2**63, 2**64 - 1)}
    assert seen == {7, 21}
    for masks in ({}, {"top_k": 3}, {"top_p": 0.5}):
        assert math.isnan(model.draw(torch.full((1, 40), math.nan), Draws(1.0, [5], **masks)).chances[0])


def test_the_drafter_draws_the_same_tokens_alone_and_in_company():
    """A chain that leaves out its last token has used up no random bits for it."""
    prompt, sampling = random_prompt(12, 3), SamplingParams(temperature=1.2, seed=5)
    drafters = {name: ModelDrafter(model_of(), sampling) for name in ("chain", "steps")}
    text, lengths = list(prompt), set()
    for round in range(12):
        least = 0.02 * (round % 4)
        limit = Limit(
            lambda source: 5,
            lambda source, path_prob, steps, rows, least=least: path_prob >= least or steps > 0,
            pays_from=lambda source, steps, rows, least=least: 0.0 if steps else least,
        )
        chain = drafters["chain"].propose(text, limit)
        steps = alone(drafters["steps"].steps(text, limit), drafters["steps"]._answer)
        assert chain.tokens == steps.tokens
        assert (chain.probs is None) == (steps.probs is None)
        assert chain.probs is None or torch.equal(chain.probs, steps.probs)
        lengths.add(len(chain.tokens))
        for drafter in drafters.values():
            drafter.observe(min(1, len(chain.tokens)))
        text += [*chain.tokens[:1], (7 * round) % 90]
    assert len(lengths) > 2


# -------------------------------------------------------------------------------------------------------- stopping
def test_it_ends_behind_the_first_token_whose_chance_is_too_small(threads):
    model = model_of()
    for seed in range(8):
        prompt = random_prompt(9, seed)
        model.prefill(prompt[:-1])
        whole = model.draft_while(prompt[-1:], 8, [0.0] * 8)
        assert len(whole.ids) == 8 and whole.chances == sorted(whole.chances, reverse=True)
        for stop in range(8):
            least = [0.0] * 8
            least[stop] = whole.chances[stop] * 1.001
            chain = model.draft_while(prompt[-1:], 8, least)
            assert chain.ids == whole.ids[: stop + 1] and chain.chances == whole.chances[: stop + 1]
            least[stop] = whole.chances[stop] * 0.999
            assert model.draft_while(prompt[-1:], 8, least) == whole


def test_logits_that_are_not_finite_end_it(threads):
    def damaged(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3] = math.nan

    model = model_of(change=damaged)
    chain = model.draft_while([1, 2, 3], 0, [0.0] * STEPS)
    assert len(chain.ids) == 1 and math.isnan(chain.chances[0])
    drafter = ModelDrafter(model, GREEDY)
    assert drafter.propose([1, 2, 3], Limit(lambda source: 4)).tokens == []


def test_a_wide_vocabulary_has_the_lowest_of_equal_ids():
    def tied(tensors):
        weight = tensors["lm_head.weight"]
        weight[40:] = weight[:40].repeat(24, 1)

    model = model_of(vocabulary=1000, change=tied)
    for seed in range(6):
        prompt = random_prompt(6, seed)
        model.prefill(prompt[:-1])
        ids = model.draft_while(prompt[-1:], 5, [0.0] * STEPS).ids
        assert max(ids) < 40
        assert ids == step_by_step(model, prompt[-1:], 5, STEPS)[0]


def test_layers_in_torch_operations_are_asked_step_by_step():
    plain, head = heads_of(SIZES[0])
    assert not plain.chains and head.chains


# --------------------------------------------------------------------------------------------------------- drafter
@pytest.mark.parametrize("seed", range(5))
def test_the_drafter_proposes_what_it_would_step_by_step(seed):
    """With prices that stop it before a step, or leave out a token that it has looked at."""
    asked = {"chain": model_of(), "steps": model_of()}
    prompt = random_prompt(12, seed)
    chances = step_by_step(asked["steps"], prompt, 0, 6)[1]
    lengths = set()
    for i in range(6):
        for least_step, least_row in ((chances[i] * 1.001, 0.0), (0.0, chances[i] * 1.001), (0.0, 0.0)):

            def least(source, steps, rows, least_step=least_step, least_row=least_row):
                return least_step if steps else least_row

            def pays(source, path_prob, steps, rows, least=least):
                return path_prob >= least(source, steps, rows)

            drafts = {}
            for name, model in asked.items():
                drafter = ModelDrafter(model, GREEDY)
                limit = Limit(lambda source: 6, pays, pays_from=least if name == "chain" else None)
                drafts[name] = drafter.propose(prompt, limit)
                drafts[name + " later"] = drafter.propose([*prompt, *drafts[name].tokens, 5], limit)
            for later in ("", " later"):
                chain, steps = drafts["chain" + later], drafts["steps" + later]
                assert chain.tokens == steps.tokens
                assert chain.path_probs == pytest.approx(steps.path_probs, rel=1e-4)
                lengths.add((len(chain.tokens), len(chain.path_probs)))
    assert len(lengths) > 5
