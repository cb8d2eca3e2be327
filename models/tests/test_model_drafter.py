"""ModelDrafter with real models: whatever happened to its cache, it proposes what a fresh drafter would."""

import random

import pytest
import torch

from models.llama.torch_llama import TorchLlama
from models.speculative.acceptance import distribution
from models.speculative.drafters.model import ModelDrafter
from models.speculative.sampling import SamplingParams
from models.tests.engine_fixtures import build, engine_config, random_prompt, upto
from models.tests.llama_fixtures import random_tensors

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
