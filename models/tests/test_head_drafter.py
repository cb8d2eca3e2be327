"""Draft heads in the real loop: lossless, fed with the target's states whoever drafted."""

from functools import partial

import pytest
import torch

from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters import Limit, PerSequence, ReadsStates
from models.speculative.drafters.combined import Combined
from models.speculative.drafters.draft_head import HeadDrafter, HeadTreeDrafter
from models.speculative.drafters.in_step import InStep
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.engine import Engine
from models.speculative.generate import generate
from models.speculative.model import DraftHead
from models.speculative.sequence import Request
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import GREEDY, build, draw_texts, engine_config, plain, random_prompt
from models.tests.head_fixtures import build_head, head_config
from models.tests.llama_fixtures import random_tensors
from models.tests.test_generate_sampling import P_VALUE, PROMPT, SLOTS, TEXTS, VOCAB, p_values

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [
    {},
    {"draft_vocab": 40},
    {"draft_vocab": 40, "fc_norm": True, "norm_before_residual": True},
    {"norm_before_fc": True, "norm_output": True},
]


def target_of(seed=0, vocab=64, layers=3, **options):
    config = engine_config(vocab, layers)
    return build(config, random_tensors(config, seed), **options)


def chain(head, sampling=GREEDY):
    return HeadDrafter(head, sampling)


def tree(head, sampling=GREEDY):
    return HeadTreeDrafter(head, sampling, 9)


def combined(head, sampling=GREEDY):
    return Combined(PromptLookup(), HeadDrafter(head, sampling))


def text(target, drafter, prompt, k, **options):
    stats = GenerationStats()
    tokens = generate(target, drafter, prompt, controller=FixedDraftLength(k), stats=stats, **options)
    return [token.id for token in tokens], stats


# ------------------------------------------------------------------------------------------------------ lossless
@pytest.mark.parametrize("shape", SHAPES)
def test_speculative_greedy_equals_plain_greedy(shape):
    """4 heads x 3 targets x 3 prompts x 3 drafters x K 1, 3, 5 = 324 cases."""
    drafted = 0
    for seed in range(3):
        target = target_of(seed)
        head = build_head(head_config(target.config, **shape), target, seed)
        for number, length in enumerate((1, 6, 45)):
            prompt = random_prompt(length, seed=10 * seed + number)
            expected = plain(target, prompt, max_new_tokens=14)
            for make in (chain, tree, combined):
                for k in (1, 3, 5):
                    ids, stats = text(target, make(head), prompt, k, max_new_tokens=14)
                    assert ids == expected, (seed, length, make, k)
                    drafted += sum(each.drafted for each in stats.rounds)
    assert drafted > 1000


def test_sequential_verification_feeds_the_head_too():
    target = target_of()
    head = build_head(head_config(target.config), target)
    prompt = random_prompt(5, 0)
    ids, stats = text(target, chain(head), prompt, 3, max_new_tokens=40, verification="sequential")
    again, batched = text(target, chain(head), prompt, 3, max_new_tokens=40)
    assert ids == again == plain(target, prompt, max_new_tokens=40)
    assert [each.proposed for each in stats.rounds] == [each.proposed for each in batched.rounds]


def sampled(make, params, k, texts=TEXTS, compiled=False):
    config = engine_config(VOCAB, layers=1)
    tensors = random_tensors(config, seed=7)
    tensors["lm_head.weight"] *= 1.5
    target = build(config, tensors, max_seq_len=16, slots=SLOTS, compiled=compiled)
    head = build_head(head_config(config, 6, taps=(0, 1)), target, 3, slots=SLOTS, compiled=compiled)
    drafter = InStep(lambda each: make(head.slot(each.slot), each.request.sampling), head, head.taps)
    controller = partial(FixedDraftLength, k)
    counts, stats = draw_texts(target, drafter, PROMPT, params, texts, controller=controller, vocab=VOCAB)
    return target, counts, GenerationStats.merge(stats)


@pytest.mark.parametrize("make", [chain, tree])
@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"temperature": 1.3, "top_k": 5}])
def test_the_joint_distribution_of_a_text_is_the_targets(make, params):
    target, counts, stats = sampled(make, params, 2)
    assert 0.1 < stats.acceptance_rate < 0.9
    assert min(p_values((target,), params, counts)) > P_VALUE


def test_the_joint_distribution_is_the_targets_where_compiled_layers_draw():
    pytest.importorskip("llvmlite")
    params = {"temperature": 1.3, "top_k": 5}  # which drafts keep to a power of two
    target, counts, stats = sampled(chain, params, 2, compiled=True)
    assert 0.1 < stats.acceptance_rate < 0.9
    assert min(p_values((target,), params, counts)) > P_VALUE


# ------------------------------------------------------------------------------------------------------- feeding
class Noted:
    """A head drafter that notes the rows its head is given."""

    def __init__(self, drafter):
        self.drafter, self.fed = drafter, {}

    @property
    def taps(self):
        return self.drafter.taps

    def states(self, features, rows, position):
        for i, row in enumerate(rows):
            self.fed[position + i] = features[row].clone()
        self.drafter.states(features, rows, position)

    def propose(self, tokens, limit):
        return self.drafter.propose(tokens, limit)

    def settle(self, tokens):
        return self.drafter.settle(tokens)

    def observe(self, accepted):
        self.drafter.observe(accepted)


@pytest.mark.parametrize("make", [chain, tree, combined])
def test_every_position_of_the_text_is_fed_with_the_states_that_one_pass_over_it_computes(make):
    target = target_of(vocab=8)  # of so few ids a random head guesses some
    head = build_head(head_config(target.config), target)
    prompt = random_prompt(4, 1, vocab_size=8) * 2
    noted = Noted(make(head))
    ids, stats = text(target, noted, prompt, 4, max_new_tokens=50)
    whole = [*prompt, *ids]
    with target.tap(head.taps) as states:
        target.prefill(whole)
    expected = torch.cat(states, -1)
    assert sum(each.accepted for each in stats.rounds) > 0
    assert set(noted.fed) >= set(range(len(whole) - 5))
    for position, state in noted.fed.items():
        if position < len(whole):
            torch.testing.assert_close(state, expected[position], rtol=1e-4, atol=1e-5)


def test_drafts_do_not_depend_on_what_was_drafted_and_rejected_before():
    """Rows of drafted tokens are computed again: proposals are those of a head that reads the text for the first
    time."""
    target = target_of()
    head = build_head(head_config(target.config), target)
    ids, stats = text(target, chain(head), random_prompt(6, 2), 4, max_new_tokens=40)
    tokens = [*random_prompt(6, 2), *ids]
    end = 7
    for each in stats.rounds[:-1]:
        fresh = build_head(head_config(target.config), target)
        with target.tap(fresh.taps) as states:
            target.prefill(tokens[: end - 1])
        drafter = HeadDrafter(fresh, GREEDY)
        drafter.states(torch.cat(states, -1), range(end - 1), 0)
        k = len(each.proposed)
        assert drafter.propose(tokens[:end], Limit(lambda source, k=k: k)).tokens == list(each.proposed)
        end += each.emitted


def test_texts_in_two_slots_are_those_of_one():
    target = target_of(slots=2)
    head = build_head(head_config(target.config), target, slots=2)
    prompts = [random_prompt(5, 3), random_prompt(9, 4)]
    alone = [text(target.slot(0), chain(head.slot(0)), prompt, 3, max_new_tokens=30) for prompt in prompts]
    engine = Engine(target)
    drafter = PerSequence(lambda sequence: HeadDrafter(head.slot(sequence.slot), GREEDY), head.taps)
    sequences = [
        engine.add(Request(prompt, max_new_tokens=30, drafter=drafter, controller=FixedDraftLength(3)))
        for prompt in prompts
    ]
    while not engine.idle:
        engine.step()
    for sequence, prompt, (ids, stats) in zip(sequences, prompts, alone, strict=True):
        assert sequence.error is None
        assert sequence.tokens == [*prompt, *ids]
        assert [each.proposed for each in sequence.stats.rounds] == [each.proposed for each in stats.rounds]


def test_a_head_that_is_not_finite_only_costs_speed():
    target = target_of()
    head = build_head(head_config(target.config), target)
    head.network.norm.fill_(float("nan"))
    for make in (chain, tree):
        ids, stats = text(target, make(head), random_prompt(5, 5), 3, max_new_tokens=20)
        assert ids == plain(target, random_prompt(5, 5), max_new_tokens=20)
        assert not any(each.accepted for each in stats.rounds)


def test_drafters_of_heads_say_that_they_read_states():
    target = target_of()
    head = build_head(head_config(target.config), target)
    assert isinstance(head, DraftHead)
    for make in (chain, tree, combined):
        drafter = make(head)
        assert isinstance(drafter, ReadsStates)
        assert drafter.taps == head.taps
    assert Combined(PromptLookup()).taps == ()
