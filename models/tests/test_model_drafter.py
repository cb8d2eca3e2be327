"""ModelDrafter with real models: whatever happened to its cache, it proposes what a fresh drafter would."""

import random
from functools import partial

import pytest
import torch

from models.speculative.acceptance import distribution
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters import Limit
from models.speculative.drafters.in_step import InStep
from models.speculative.drafters.model import ModelDrafter
from models.speculative.generate import generate
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import build, build_pair, draw_texts, engine_config, random_prompt, upto
from models.tests.engine_fixtures import plain as plain_text
from models.tests.llama_fixtures import random_tensors
from models.tests.test_generate_sampling import P_VALUE
from models.tests.test_prompt_lookup import VOCAB, WARM, joint_law, p_values, tiny_model
from models.torch_llama.model import TorchLlama

CONFIG = engine_config(layers=2)
WEIGHTS = random_tensors(CONFIG, seed=5)
ROWS = 8  # fixed_rows, hence max_rows, so that catching up takes several chunks
GREEDY = SamplingParams()


def draft_model(**options) -> TorchLlama:
    return build(CONFIG, WEIGHTS, fixed_rows=ROWS, **options)


def histories(seed: int, rounds: int = 12):
    """How a sequence might grow: (tokens to draft, how many are accepted, plain tokens that follow)."""
    rng = random.Random(seed)
    for _ in range(rounds):
        k = rng.randint(1, ROWS - 1)
        yield k, rng.choice([0, k, rng.randint(0, k)]), rng.choice([1, 1, 1, 2, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS])


@pytest.mark.parametrize("seed", range(6))
def test_greedy_proposals_equal_those_of_a_fresh_drafter(seed):
    rng = random.Random(seed)
    used, fresh_model = ModelDrafter(draft_model(max_seq_len=512), GREEDY), draft_model(max_seq_len=512)
    tokens = random_prompt(rng.randint(1, 20), seed)
    for k, accepted, plain in histories(seed):
        tokens.append(rng.randrange(CONFIG.vocab_size))
        draft = used.propose(tokens, upto(k))
        assert draft.probs is None
        assert draft.tokens == ModelDrafter(fresh_model, GREEDY).propose(tokens, upto(k)).tokens
        assert len(draft.tokens) == k
        used.observe(accepted)
        tokens += draft.tokens[:accepted] + [rng.randrange(CONFIG.vocab_size) for _ in range(plain - 1)]


@pytest.mark.parametrize("seed", range(4))
def test_sampled_proposals_come_with_the_law_they_were_drawn_from(seed):
    """Each row of q is what the model, reading everything anew, gives after the tokens drafted before it."""
    rng = random.Random(seed)
    params = SamplingParams(temperature=0.8, top_k=12, top_p=0.9, seed=seed)
    used, reader = ModelDrafter(draft_model(max_seq_len=512), params), draft_model(max_seq_len=512)
    tokens = random_prompt(rng.randint(1, 20), seed)
    for k, accepted, plain in histories(seed, rounds=6):
        tokens.append(rng.randrange(CONFIG.vocab_size))
        draft = used.propose(tokens, upto(k))
        assert draft.probs.shape == (k, CONFIG.vocab_size)
        for i, token in enumerate(draft.tokens):
            logits = reader.prefill(tokens + draft.tokens[:i])
            expected = distribution(logits[None], params.temperature, params.top_k, params.top_p)[0]
            torch.testing.assert_close(draft.probs[i], expected, atol=1e-4, rtol=1e-3)
            assert draft.probs[i, token] > 0
        used.observe(accepted)
        tokens += draft.tokens[:accepted] + [rng.randrange(CONFIG.vocab_size) for _ in range(plain - 1)]


def feeds(model, method="draft_greedy"):
    return [(rows, position) for name, rows, position in model.calls if name == method]


def test_full_acceptance_leaves_two_tokens_to_feed_else_one():
    model = draft_model()
    drafter = ModelDrafter(model, GREEDY)
    tokens = [1, 2, 3]
    for accepted in (4, 4, 3, 0, 4):
        draft = drafter.propose(tokens, upto(4))
        drafter.observe(accepted)
        tokens += [*draft.tokens[:accepted], 9]
    drafter.propose(tokens, upto(4))
    # The sequence has 3, 8, 13, 17, 18, 23 tokens; after full acceptance the cache lacks the last two of them.
    assert feeds(model) == [(1, 2), (2, 6), (2, 11), (1, 16), (1, 17), (2, 21)]
    assert [call for call in model.calls if call[0] == "prefill"] == [("prefill", 2, 0)]


def test_sampling_feeds_the_same_way():
    model = draft_model()
    drafter = ModelDrafter(model, SamplingParams(temperature=1.0))
    drafter.propose([1, 2, 3], upto(2))
    drafter.observe(2)
    drafter.propose([1, 2, 3, 4, 5, 6], upto(2))
    assert feeds(model, "forward") == [(1, 2), (1, 3), (2, 4), (1, 6)]


def test_long_plain_stretches_are_caught_up_in_chunks():
    model = draft_model()
    drafter = ModelDrafter(model, GREEDY)
    drafter.propose([1, 2], upto(1))
    drafter.observe(1)
    model.calls.clear()
    drafter.propose([1, 2, *range(3, 3 + 2 * ROWS + 3)], upto(2))
    assert model.calls == [("greedy", ROWS, 2), ("greedy", ROWS, 2 + ROWS), ("draft_greedy", 3, 2 + 2 * ROWS)]


def test_a_full_draft_context_shortens_the_draft_then_ends_it():
    drafter = ModelDrafter(draft_model(max_seq_len=12), GREEDY)
    tokens = random_prompt(9, seed=1)
    reader = draft_model()
    for length, expected in ((9, 4), (11, 2), (12, 1), (13, 0), (40, 0)):
        tokens = tokens[:length] + random_prompt(length - len(tokens), seed=length)
        draft = drafter.propose(tokens, upto(5))
        assert len(draft.tokens) == expected
        if expected:
            assert draft.tokens == ModelDrafter(reader, GREEDY).propose(tokens, upto(expected)).tokens
            drafter.observe(0)


def test_reading_the_prompt_is_reported_apart_and_once():
    drafter = ModelDrafter(draft_model(), GREEDY)
    assert drafter.propose([1, 2, 3], upto(2)).prefill_s > 0
    drafter.observe(1)
    assert drafter.propose([1, 2, 3, 4, 5], upto(2)).prefill_s == 0


def test_draft_and_target_draw_from_different_streams():
    """A shared stream would tie the decision about a token to its drawing: not lossless."""
    params = SamplingParams(temperature=1.0, seed=4)
    flat = torch.full((40, 64), 1 / 64)
    ours, theirs = params.generator("target"), ModelDrafter(draft_model(), params)._generator
    assert torch.multinomial(flat, 1, generator=ours).tolist() != torch.multinomial(flat, 1, generator=theirs).tolist()


# ------------------------------------------------------------------------------------------ stopping by confidence
def priced(k, least_step=0.0, least_row=0.0):
    """Allows k tokens; a step pays from one reach on, a row from another."""
    return Limit(lambda source: k, lambda source, reach, steps, rows: reach >= (least_step if steps else least_row))


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.9, top_k=20, seed=3)])
def test_reach_is_the_product_of_the_likeliest_probabilities(sampling):
    _, draft = build_pair(1, 0.1)
    prompt = random_prompt(12, 5)
    proposed = ModelDrafter(draft, sampling).propose(prompt, priced(4))
    assert len(proposed.tokens) == len(proposed.path_probs) == 4
    draft.prefill(prompt[:-1])
    logits = draft.forward([prompt[-1], *proposed.tokens[:3]], len(prompt) - 1)
    laws = torch.softmax(logits, -1) if sampling.greedy else distribution(logits, 0.9, 20)
    torch.testing.assert_close(torch.tensor(proposed.path_probs), laws.max(-1).values.cumprod(0), rtol=1e-4, atol=1e-5)
    if sampling.greedy:
        assert proposed.tokens == laws.argmax(-1).tolist()


def test_a_step_that_does_not_pay_is_not_made():
    _, draft = build_pair(1, 0.1)
    prompt = random_prompt(12, 5)
    reach = ModelDrafter(draft, GREEDY).propose(prompt, priced(6)).path_probs
    draft.calls.clear()
    stopped = ModelDrafter(draft, GREEDY).propose(prompt, priced(6, least_step=reach[2] * 1.001))
    assert len(stopped.tokens) == len(stopped.path_probs) == 3
    assert [call[0] for call in draft.calls] == ["prefill", "forward", "forward", "forward"]


def test_a_token_that_does_not_pay_its_row_is_left_out_and_its_chance_is_told():
    _, draft = build_pair(1, 0.1)
    prompt = random_prompt(12, 5)
    reach = ModelDrafter(draft, GREEDY).propose(prompt, priced(6)).path_probs
    stopped = ModelDrafter(draft, GREEDY).propose(prompt, priced(6, least_row=reach[2] * 1.001))
    assert len(stopped.tokens) == 2
    assert stopped.path_probs == reach[:3]
    assert len(ModelDrafter(draft, GREEDY).propose(prompt, priced(6, 2.0, 2.0)).tokens) == 1  # one is always proposed


class Priced(FixedDraftLength):
    """Lets a draft stop where its reach has fallen too far."""

    def __init__(self, k, least):
        super().__init__(k)
        self.least = least

    def pays(self, source, reach, steps, rows):
        return reach >= self.least


@pytest.mark.parametrize("noise", [0.0, 0.07, None])
def test_greedy_text_is_plain_greedy_text_wherever_the_draft_stops(noise):
    """3 kinds of draft x 6 models x 3 prompts x 4 prices = 216 cases."""
    lengths = set()
    for seed in range(6):
        target, draft = build_pair(seed, noise, 24)
        for number, length in enumerate((1, 6, 40)):
            prompt = random_prompt(length, 10 * seed + number, 24)
            expected = plain_text(target, prompt, max_new_tokens=16)
            for least in (0.02, 0.1, 0.3, 0.6):
                stats = GenerationStats()
                stream = generate(target, ModelDrafter(draft, GREEDY), prompt, controller=Priced(6, least),
                                  max_new_tokens=16, stats=stats)  # fmt: skip
                assert [token.id for token in stream] == expected, (seed, length, least)
                lengths |= {r.drafted for r in stats.rounds if not r.cut}
    assert lengths >= {1, 2, 3}


def test_sampled_text_follows_the_targets_law_wherever_the_draft_stops():
    target, draft = tiny_model(noise=0), tiny_model(noise=0.5)
    prompt, controller = [3, 1, 4], partial(Priced, 4, 0.3)
    drafter = InStep(lambda each: ModelDrafter(draft.slot(each.slot), each.request.sampling), draft)
    counts, stats = draw_texts(
        target, drafter, prompt, WARM, 1500, controller=controller, vocab=VOCAB, tokens=5, counted=3
    )
    lengths = {r.drafted for each in stats for r in each.rounds}
    assert lengths >= {1, 2, 3}
    assert min(p_values(counts, joint_law(target, prompt))) > P_VALUE
