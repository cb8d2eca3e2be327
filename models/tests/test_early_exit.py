"""Early exit: whatever the first layers leave for the target, it writes what it would alone."""

import itertools
from collections import Counter
from functools import partial

import pytest
import torch

from models.speculative.acceptance import distribution
from models.speculative.control.policy import AutoDraftLength, FixedDraftLength
from models.speculative.drafters import PerSequence
from models.speculative.drafters.combined import Combined
from models.speculative.drafters.early_exit import EarlyExit
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.generate import generate
from models.speculative.sampling import SamplingParams
from models.tests.early_exit_fixtures import EXITS, Switching, early_text, outcomes, weak_tail
from models.tests.engine_fixtures import GREEDY, draw_texts, plain, random_prompt, upto
from models.tests.test_generate_sampling import P_VALUE, PROMPT, SLOTS, VOCAB, p_values

pytestmark = pytest.mark.usefixtures("one_thread")


# -------------------------------------------------------------------------------------------------- lossless
@pytest.mark.parametrize("layers, exit_layer", EXITS)
def test_greedy_text_equals_plain_greedy(layers, exit_layer):
    """6 exits x 4 targets x 3 prompts x 4 draft lengths = 288 cases, with and without fixed rows."""
    rounds = []
    for seed in range(4):
        target = weak_tail(layers, exit_layer, seed, fixed_rows=(None, 8)[seed % 2])
        for number, length in enumerate((1, 6, 40)):
            prompt = random_prompt(length, seed=10 * seed + number)
            expected = plain(target, prompt, max_new_tokens=16)
            for k in (1, 2, 4, 7):
                ids, stats = early_text(target, exit_layer, prompt, k, max_new_tokens=16)
                assert ids == expected, (seed, length, k)
                assert stats.draft_prefill_s == 0
                assert all(r.source == "early-exit" and r.drafted <= k for r in stats.rounds if r.drafted)
                rounds += stats.rounds
    assert min(outcomes(rounds)) > 10, outcomes(rounds)


def test_bf16_with_fixed_rows_is_exact_too():
    accepted = 0
    for seed, (layers, exit_layer) in enumerate(EXITS):
        target = weak_tail(layers, exit_layer, seed, dtype="bf16", fixed_rows=8)
        prompt = random_prompt(6, seed)
        expected = plain(target, prompt, max_new_tokens=60)
        for k in (1, 3, 7):
            ids, stats = early_text(target, exit_layer, prompt, k, max_new_tokens=60)
            assert ids == expected
            accepted += sum(r.accepted for r in stats.rounds)
    assert accepted > 100


@pytest.mark.parametrize("dtype, fixed_rows", [("bf16", 7), ("fp32", 7), ("fp32", None)])
def test_logits_of_a_verification_are_those_of_one_without_a_draft(dtype, fixed_rows):
    """With fixed rows bit by bit, the cache included; also where the draft's rows read one more block of the cache."""
    options = {"dtype": dtype, "fixed_rows": fixed_rows, "max_seq_len": 320}
    target, other = (weak_tail(3, 2, 1, **options) for _ in range(2))
    text = random_prompt(300, seed=1)
    for position, exit_layer, k in itertools.product((1, 60, 122, 125, 127, 128, 250, 254), (1, 2), (1, 3, 6)):
        for model in (target, other):
            model.prefill(text[:position])
        block, first = text[position : position + k + 1], target.first_layers(exit_layer)
        for i, token in enumerate(block[:-1]):
            first.forward([token], position + i)
        ours, theirs = target.forward(block, position), other.forward(block, position)
        end = position + len(block)
        if fixed_rows:
            assert torch.equal(ours, theirs)
            assert torch.equal(target.kv[:, :end], other.kv[:, :end])
        else:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_sequential_verification_writes_the_same(k):
    target = weak_tail(3, 1, seed=3)
    prompt = random_prompt(6, seed=3)
    expected, batched = early_text(target, 1, prompt, k, max_new_tokens=50)
    ids, stats = early_text(target, 1, prompt, k, max_new_tokens=50, verification="sequential")
    assert ids == expected == plain(target, prompt, max_new_tokens=50)
    assert [r.accepted for r in stats.rounds] == [r.accepted for r in batched.rounds]


@pytest.mark.parametrize("gap", [1, 9])
def test_plain_rounds_in_between_leave_no_hole(gap):
    """The first layers are the whole model but for nothing: every draft is kept, after any number of plain rounds."""
    target = weak_tail(3, 2, seed=4, scale=0.0)
    prompt = random_prompt(6, seed=4)
    ids, stats = early_text(target, 2, prompt, controller=Switching(3, gap), max_new_tokens=90)
    assert ids == plain(target, prompt, max_new_tokens=90)
    assert {r.drafted for r in stats.rounds} >= {0, 3}
    assert stats.acceptance_rate == 1


def test_with_prompt_lookup_before_it():
    rounds = {"early-exit": [], "lookup": []}
    for seed in range(12):
        target = weak_tail(3, 1, seed, vocab_size=12, fixed_rows=(None, 8)[seed % 2])
        prompt = random_prompt(20, seed, vocab_size=12)
        drafter = Combined(PromptLookup(), EarlyExit(target, 1, GREEDY))
        ids, stats = early_text(target, 1, prompt, 5, drafter, max_new_tokens=60)
        assert ids == plain(target, prompt, max_new_tokens=60)
        for r in stats.rounds:
            rounds["early-exit" if r.source == "early-exit" else "lookup"].append(r)
    assert min(*outcomes(rounds["early-exit"]), *outcomes(rounds["lookup"])) > 5


class Priced(FixedDraftLength):
    """A token pays if it is likely for a random model, whatever the time: drafts end where the layers are unsure."""

    def pays(self, source: str, reach: float, steps: int, rows: int) -> bool:
        return reach > 0.1 ** (rows - 1)


def test_drafts_may_end_where_the_first_layers_are_unsure():
    lengths, rounds = Counter(), []
    for seed in range(6):
        target = weak_tail(3, 2, seed, scale=0.1, fixed_rows=(None, 8)[seed % 2])
        prompt = random_prompt(6, seed)
        ids, stats = early_text(target, 2, prompt, controller=Priced(6), max_new_tokens=60)
        assert ids == plain(target, prompt, max_new_tokens=60)
        lengths.update(r.drafted for r in stats.rounds if not r.cut)
        rounds += stats.rounds
    assert len(lengths) > 3 and sum(r.accepted for r in rounds) > 50, lengths


def test_the_controller_that_chooses_lengths_can_use_it():
    """Whatever the times of this machine are, and so the lengths that it chooses."""
    target = weak_tail(4, 1, seed=2, scale=0.05, max_seq_len=256)
    prompt, controller = random_prompt(6, seed=2), AutoDraftLength()
    ids, stats = early_text(target, 1, prompt, controller=controller, max_new_tokens=200)
    assert ids == plain(target, prompt, max_new_tokens=200)
    assert len(controller.chosen) == len(stats.rounds)
    assert "early-exit" in controller.report()["acceptance"]


# ------------------------------------------------------------------------------------------- where a text ends
@pytest.mark.parametrize("k", [1, 3, 7])
def test_nothing_follows_a_stop_token(k):
    target = weak_tail(3, 1, seed=5, scale=0.1)
    for seed in range(8):
        prompt = random_prompt(5, seed)
        whole = plain(target, prompt, max_new_tokens=40)
        for stop in whole[:20:3]:
            ids, stats = early_text(target, 1, prompt, k, max_new_tokens=40, stop_ids=[stop])
            assert ids == whole[: whole.index(stop) + 1]
            assert (stats.finish_reason, stats.tokens) == ("stop", len(ids))


@pytest.mark.parametrize("fixed_rows", [None, 8])
@pytest.mark.parametrize("k", [0, 1, 4, 7])
def test_a_text_may_fill_the_context(k, fixed_rows):
    for length in (1, 19, 22, 23):
        target = weak_tail(3, 2, seed=6, scale=0.1, max_seq_len=24, fixed_rows=fixed_rows)
        prompt = random_prompt(length, seed=length)
        ids, stats = early_text(target, 2, prompt, k, max_new_tokens=100)
        assert ids == plain(target, prompt, max_new_tokens=100)
        assert (len(ids), stats.finish_reason) == (24 - length, "context")


def test_a_draft_ends_with_the_context():
    target = weak_tail(3, 2, seed=6, max_seq_len=12)
    tokens = random_prompt(12, seed=1)
    target.prefill(tokens[:-1])
    for length, expected in ((9, 4), (11, 2), (12, 1)):
        assert len(EarlyExit(target, 2, GREEDY).propose(tokens[:length], upto(5)).tokens) == expected
    assert EarlyExit(target, 2, GREEDY).propose([*tokens, 1], upto(5)).tokens == []


@pytest.mark.parametrize("limit", [1, 2, 3, 11])
def test_max_new_tokens(limit):
    target = weak_tail(2, 1, seed=7)
    prompt = random_prompt(4, seed=7)
    ids, stats = early_text(target, 1, prompt, 5, max_new_tokens=limit)
    assert ids == plain(target, prompt, max_new_tokens=limit)
    assert (len(ids), stats.finish_reason) == (limit, "length")


def test_after_an_interruption_the_next_text_is_right():
    """Closed by its reader after any number of tokens, or interrupted when a verification was to go on from a draft."""
    target = weak_tail(3, 1, seed=8)
    prompts = [random_prompt(6, seed=8), random_prompt(6, seed=9)]
    expected = [plain(target, prompt, max_new_tokens=30) for prompt in prompts]
    for taken in range(1, 12):
        stream = generate(target, EarlyExit(target, 1, GREEDY), prompts[0])
        assert [token.id for token in itertools.islice(stream, taken)] == expected[0][:taken]
        stream.close()
        assert early_text(target, 1, prompts[1], max_new_tokens=30)[0] == expected[1]
        target.fail_at = len(target.calls) + 1 + taken  # a prefill, then the verifications
        with pytest.raises(KeyboardInterrupt):
            early_text(target, 1, prompts[0])
        target.fail_at = None
        assert early_text(target, 1, prompts[taken % 2], max_new_tokens=30)[0] == expected[taken % 2]


# ------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("params, options", [
    pytest.param({"temperature": 1.0}, {}, id="temperature-1"),
    pytest.param({"temperature": 0.7}, {"verification": "sequential"}, id="cool-sequential"),
    pytest.param({"temperature": 1.3, "top_k": 6, "top_p": 0.9}, {}, id="top_k-top_p"),
    pytest.param({"temperature": 0.6}, {"greedy_draft": True}, id="deterministic-draft"),
])  # fmt: skip
def test_joint_law_of_the_text_is_the_targets(params, options):
    """Tokens 2 and 3 are drafted first, 4 is the bonus or of another round."""
    target = weak_tail(2, 1, seed=7, scale=0.4, vocab_size=VOCAB, max_seq_len=16, slots=SLOTS)
    options = dict(options)
    greedy_draft = options.pop("greedy_draft", False)

    def drafts(sequence):
        return EarlyExit(target.slot(sequence.slot), 1, GREEDY if greedy_draft else sequence.request.sampling)

    controller = partial(FixedDraftLength, 2)
    counts, stats = draw_texts(
        target, PerSequence(drafts), PROMPT, params, 900, controller=controller, vocab=VOCAB, **options
    )
    kept = Counter(r.accepted for one in stats for r in one.rounds if r.drafted == 2)
    assert min(kept[accepted] for accepted in (0, 1, 2)) > 50, kept
    assert min(p_values((target,), params, counts)) > P_VALUE


def test_sampled_drafts_come_with_the_law_they_were_drawn_from():
    target, other = (weak_tail(3, 2, seed=2) for _ in range(2))
    params = SamplingParams(temperature=0.8, top_k=12, top_p=0.9, seed=3)
    tokens = random_prompt(9, seed=2)
    target.prefill(tokens[:-1])
    draft = EarlyExit(target, 2, params).propose(tokens, upto(4))
    assert draft.probs.shape == (4, 64)
    for i, token in enumerate(draft.tokens):
        history = [*tokens, *draft.tokens[:i]]
        other.prefill(history)
        logits = other.first_layers(2).prefill(history)
        law = distribution(logits[None], params.temperature, params.top_k, params.top_p)[0]
        torch.testing.assert_close(draft.probs[i], law, atol=1e-4, rtol=1e-3)
        assert law[token] > 0
