"""Sampling through the real loop: the text follows the target's law, whatever the draft is.

Pearson's chi-square test of the joint law of consecutive tokens, expected counts by enumeration of the target alone.
A test fails below P_VALUE; seeds are fixed, so it fails always or never. The same statistic must reject four wrong
rules, which shows that the number of texts is large enough to see an error.
"""

import functools
import itertools

import pytest
import torch
from scipy.stats import chisquare

from models.speculative import acceptance
from models.speculative.acceptance import distribution
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters.in_step import InStep
from models.speculative.drafters.model import ModelDrafter
from models.speculative.generate import generate
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import build, build_pair, draw_texts, engine_config, perturbed, random_prompt
from models.tests.llama_fixtures import random_tensors

P_VALUE = 1e-4
VOCAB = 8
TEXTS = 900
PROMPT = [3]
SLOTS = 8


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_model(noise: float, **options):
    """One layer, 8 tokens, logits spread enough to be far from uniform; with noise a relative of the model without."""
    config = engine_config(VOCAB, layers=1)
    tensors = random_tensors(config, seed=7)
    tensors["lm_head.weight"] *= 1.5
    return build(config, perturbed(tensors, noise, seed=8), **{"max_seq_len": 16, **options})


@pytest.fixture(scope="module")
def models():
    """(target, draft)"""
    return tiny_model(noise=0, slots=SLOTS), tiny_model(noise=0.5, slots=SLOTS)


@functools.cache
def next_logits(target, prefix: tuple[int, ...]) -> torch.Tensor:
    """[VOCAB] after PROMPT and what was drawn, read anew; once for all distributions that are made of it."""
    return target.prefill([*PROMPT, *prefix])


def joint_law(target, params: SamplingParams, tokens: int) -> torch.Tensor:
    """p(t1, ..., tn) after PROMPT [VOCAB] * n, from the target alone, reading each prefix anew."""
    joint = torch.ones([VOCAB] * tokens, dtype=torch.float64)
    for length in range(tokens):
        for prefix in itertools.product(range(VOCAB), repeat=length):
            logits = next_logits(target, prefix)
            law = distribution(logits[None], params.temperature, params.top_k, params.top_p)[0].double()
            joint[prefix] *= law.view([VOCAB] + [1] * (tokens - length - 1))
    return joint / joint.sum()


def chi_square_p_value(observed: torch.Tensor, law: torch.Tensor) -> float:
    """P(chi-square >= statistic) of counts against a law; cells expecting fewer than 5 are taken together."""
    expected = law * observed.sum()
    assert (observed[law == 0] == 0).all(), "a masked token was emitted"
    large = expected >= 5
    observed = torch.cat([observed[large], observed[~large].sum()[None]]).double()
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    if expected[-1] < 5:  # too little to be a cell of its own
        observed = torch.cat([observed[:-2], observed[-2:].sum()[None]])
        expected = torch.cat([expected[:-2], expected[-2:].sum()[None]])
    assert len(expected) > 10, "too few cells to tell anything"
    return float(chisquare(observed, expected).pvalue)


def write_texts(models, params: dict, k: int, greedy_draft=False, verification="batched", texts=TEXTS):
    """Counts [VOCAB] * 4 of the four tokens of each text, and the statistics of all of them.

    They are written side by side where there are slots. A text is the one that is written alone: `test_batch`, and by
    the draws themselves below.
    """
    target, draft = models

    def drafts(sequence):
        sampling = SamplingParams() if greedy_draft else sequence.request.sampling
        return ModelDrafter(draft.slot(sequence.slot), sampling)

    drafter = InStep(drafts, draft) if k else None
    counts, stats = draw_texts(
        target,
        drafter,
        PROMPT,
        params,
        texts,
        controller=lambda: FixedDraftLength(k),
        vocab=VOCAB,
        verification=verification,
    )
    return counts, GenerationStats.merge(stats)


def p_values(models, params: dict, counts: torch.Tensor) -> list[float]:
    """Of tokens 1-3, 2-4, 2-3 and 3-4 of four: 2 and 3 are drafted first, 4 is the bonus or of another round."""
    law = joint_law(models[0], SamplingParams(**params), 4)
    return [chi_square_p_value(counts.sum(others), law.sum(others)) for others in ((3,), (0,), (0, 3), (0, 1))]


@pytest.mark.parametrize("params, k, options", [
    pytest.param({"temperature": 1.0}, 2, {}, id="temperature-1"),
    pytest.param({"temperature": 0.7}, 2, {"verification": "sequential"}, id="cool-sequential"),
    pytest.param({"temperature": 1.3, "top_k": 5}, 2, {}, id="top_k"),
    pytest.param({"temperature": 1.3, "top_p": 0.85}, 2, {}, id="top_p"),
    pytest.param({"temperature": 0.6}, 2, {"greedy_draft": True}, id="deterministic-draft"),
    pytest.param({"temperature": 1.0}, 0, {}, id="plain"),
])  # fmt: skip
def test_joint_law_of_the_text_is_the_targets(models, params, k, options):
    counts, stats = write_texts(models, params, k, **options)
    if k:
        assert 0.2 < stats.acceptance_rate < 0.9, "rejection or acceptance is hardly ever tried"
        assert {r.accepted for r in stats.rounds if r.drafted == k} == set(range(k + 1))
    assert min(p_values(models, params, counts)) > P_VALUE


@pytest.mark.parametrize("greedy_draft", [False, True])
def test_texts_side_by_side_have_the_draws_of_texts_alone(models, greedy_draft):
    alone = tiny_model(noise=0), tiny_model(noise=0.5)
    params = {"temperature": 1.3, "top_p": 0.85}
    counts, stats = write_texts(models, params, 2, greedy_draft, texts=40)
    expected, those = write_texts(alone, params, 2, greedy_draft, texts=40)
    assert torch.equal(counts, expected)
    assert [(r.drafted, r.accepted) for r in stats.rounds] == [(r.drafted, r.accepted) for r in those.rounds]


def test_a_draft_equal_to_the_target_is_always_accepted_and_lossless(models):
    pair = (models[0], tiny_model(noise=0, slots=SLOTS))
    counts, stats = write_texts(pair, {"temperature": 1.0}, 2)
    assert stats.acceptance_rate > 0.999
    assert min(p_values(pair, {"temperature": 1.0}, counts)) > P_VALUE


def from_the_target_not_the_residual(monkeypatch):
    monkeypatch.setattr(acceptance, "residual", lambda p, q: p)


def masks_after_the_residual(monkeypatch):
    """litgpt's slip: top-k of p only once p - q has been taken."""
    right = acceptance.residual
    monkeypatch.setattr(acceptance, "residual", lambda p, q: distribution(right(p, q).log()[None], 1.0, 2)[0])


def soft_law_of_a_deterministic_draft(monkeypatch):
    right = acceptance.accept_sampled
    uniform = torch.full((2, VOCAB), 1 / VOCAB)
    monkeypatch.setattr(
        "models.speculative.verify.accept_sampled", lambda drafted, p, q, g: right(drafted, p, uniform, g)
    )


def one_stream_for_both(monkeypatch):
    right = SamplingParams.generator
    monkeypatch.setattr(SamplingParams, "generator", lambda self, stream: right(self, "target"))


@pytest.mark.parametrize("mistake, greedy_draft", [
    (from_the_target_not_the_residual, False), (masks_after_the_residual, False),
    (soft_law_of_a_deterministic_draft, True), (one_stream_for_both, False),
])  # fmt: skip
def test_the_statistic_finds_wrong_rules(monkeypatch, models, mistake, greedy_draft):
    mistake(monkeypatch)
    counts, _ = write_texts(models, {"temperature": 1.0}, 2, greedy_draft, texts=600)
    monkeypatch.undo()
    assert min(p_values(models, {"temperature": 1.0}, counts)) < P_VALUE / 100


# ------------------------------------------------------------------------------------------- seeds and masks
SAMPLING = [
    {"temperature": 0.8}, {"temperature": 1.5, "top_k": 3}, {"temperature": 2.0, "top_p": 0.4},
    {"temperature": 1.2, "top_k": 10, "top_p": 0.8},
]  # fmt: skip


def text(pair, prompt, seed, params, k=4, **options) -> list[int]:
    sampling = SamplingParams(**params, seed=seed)
    drafter = ModelDrafter(pair[1], sampling) if k else None
    options = {"controller": FixedDraftLength(k), "max_new_tokens": 24, **options}
    return [token.id for token in generate(pair[0], drafter, prompt, sampling=sampling, **options)]


@pytest.fixture(scope="module")
def pair():
    return build_pair(seed=2, noise=0.1)


@pytest.mark.parametrize("params", SAMPLING)
def test_equal_seeds_give_equal_texts_and_others_differ(pair, params):
    prompt = random_prompt(5, seed=1)
    for k in (0, 1, 4):
        texts = [text(pair, prompt, seed, params, k) for seed in range(4)]
        assert texts == [text(pair, prompt, seed, params, k) for seed in range(4)]
        assert len({tuple(ids) for ids in texts}) == 4


@pytest.mark.parametrize("params", SAMPLING)
def test_sequential_verification_draws_the_same_text(pair, params):
    for seed in range(5):
        prompt = random_prompt(5, seed)
        for k in (1, 4, 7):
            batched = text(pair, prompt, seed, params, k)
            assert text(pair, prompt, seed, params, k, verification="sequential") == batched


@pytest.mark.parametrize("params", SAMPLING[1:])
def test_no_masked_token_is_ever_emitted(pair, params):
    """Also where the draft, which is masked by its own logits, proposes one."""
    sampling = SamplingParams(**params)
    for seed in range(12):
        prompt = random_prompt(5, seed)
        ids = text(pair, prompt, seed, params, k=1 + seed % 6)
        sequence = prompt + ids
        logits = pair[0].forward(sequence[:-1], 0)[len(prompt) - 1 :]
        laws = distribution(logits, sampling.temperature, sampling.top_k, sampling.top_p)
        assert (laws[range(len(ids)), ids] > 0).all()


@pytest.mark.parametrize("k", [0, 2, 31])
@pytest.mark.parametrize("params", SAMPLING)
def test_sampled_text_ends_where_it_should(pair, params, k):
    prompt = random_prompt(5, seed=3)
    whole = text(pair, prompt, 9, params, k)
    assert len(whole) == 24
    assert len(text(pair, prompt, 9, params, k, max_new_tokens=1)) == 1
    # A stop changes neither the draws before it nor what they mean.
    stop = whole[7]
    assert text(pair, prompt, 9, params, k, stop_ids=[stop]) == whole[: whole.index(stop) + 1]


def test_a_greedy_drafter_serves_a_sampling_target_and_the_other_way_round(pair):
    prompt, sampling = random_prompt(5, seed=4), SamplingParams(temperature=0.9, seed=5)
    tokens = list(generate(pair[0], ModelDrafter(pair[1], SamplingParams()), prompt, sampling=sampling))
    assert len(tokens) == 123  # 128 positions less the prompt
    expected = [token.id for token in generate(pair[0], None, prompt, max_new_tokens=24)]
    greedy = generate(pair[0], ModelDrafter(pair[1], sampling), prompt, max_new_tokens=24)
    assert [token.id for token in greedy] == expected
