"""Drafting and verification as one program: the rules, on real tiny models. The device program has tests of its own."""

import pytest

from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters.early_exit import EarlyExit
from models.speculative.drafters.model import ModelDrafter
from models.speculative.generate import generate
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import GREEDY, build_pair, plain, random_prompt, speculate, upto

NOISES = (0.0, 0.05, 0.1, None)


class ComposedRound:
    """A FusedGreedy made of the two models' own methods; notes (position, k) of each round."""

    def __init__(self, target, draft, lengths=range(1, 32)):
        self.target, self.draft, self.draft_lengths = target, draft, lengths
        self.features = None
        self.rounds = []

    def run(self, tokens, position, k):
        assert len(tokens) >= 2 and position >= 0 and 1 <= k <= max(self.draft_lengths)
        tokens, position = tokens[-2:], position + len(tokens) - 2
        self.rounds.append((position, k))
        drafted = self.draft.draft_greedy(tokens, position, k)
        verified = self.target.greedy([tokens[-1], *drafted], position + 1)
        agree = [ours == theirs for ours, theirs in zip(drafted, verified, strict=False)]
        return drafted, verified, [*agree, False].index(False)


class Spied(ModelDrafter):
    """Keeps every draft it has made."""

    def __init__(self, fused, model):
        super().__init__(model, GREEDY, rounds=fused)
        self.drafts = []

    def propose(self, tokens, limit):
        self.drafts.append(super().propose(tokens, limit))
        return self.drafts[-1]


def fused_text(target, draft, prompt, k=4, lengths=range(1, 32), controller=None, **options):
    """(ids, stats, drafter, fused) of a generation in fused rounds."""
    fused, stats = ComposedRound(target, draft, lengths), GenerationStats()
    drafter = Spied(fused, draft)
    controller = controller or FixedDraftLength(k)
    tokens = generate(target, drafter, prompt, controller=controller, stats=stats, **options)
    return [token.id for token in tokens], stats, drafter, fused


def outcomes(stats):
    return [(r.drafted, r.accepted, r.emitted, r.cut) for r in stats.rounds]


@pytest.fixture(scope="module")
def pair():
    """A pair whose rounds end in every possible way."""
    return build_pair(seed=0, noise=0.07)


# -------------------------------------------------------------------------------------------------- lossless
@pytest.mark.parametrize("noise", NOISES)
def test_fused_greedy_text_equals_plain_text(noise):
    """4 kinds of draft x 5 pairs x 10 prompts, each with its own K: 200 cases."""
    rounds = []
    for seed in range(5):
        target, draft = build_pair(seed, noise)
        for number in range(10):
            prompt, k = random_prompt(1 + 4 * number, seed=10 * seed + number), 1 + (seed + number) % 8
            ids, stats, _, fused = fused_text(target, draft, prompt, k, max_new_tokens=16)
            assert ids == plain(target, prompt, max_new_tokens=16), (seed, number, k)
            assert len(fused.rounds) == sum(r.drafted > 0 for r in stats.rounds) > 0
            rounds += [r for r in stats.rounds if r.drafted and not r.cut]
    whole = sum(r.accepted == r.drafted for r in rounds)
    none = sum(r.accepted == 0 for r in rounds)
    if noise == 0:
        assert whole == len(rounds)
    elif noise:
        assert min(whole, none, len(rounds) - whole - none) > 10
    else:
        assert none > 0.9 * len(rounds)


def test_rounds_end_as_they_do_with_two_models(pair):
    for seed in range(10):
        prompt = random_prompt(6, seed)
        ids, _, apart = speculate(*pair, prompt, 4, max_new_tokens=40)
        together = fused_text(*pair, prompt, 4, max_new_tokens=40)
        assert together[0] == ids
        assert outcomes(together[1]) == outcomes(apart)


def test_a_verified_draft_costs_the_target_no_forward_of_the_loops(pair):
    target, _ = pair
    target.calls.clear()
    _, stats, drafter, fused = fused_text(*pair, random_prompt(6, seed=3), 3, max_new_tokens=40)
    assert not any(draft.tokens for draft in drafter.drafts)
    # one by the fused round itself, and one for each token that is decoded plainly
    assert len(target.calls) == 1 + len(stats.rounds)
    assert [r.verify_s for r in stats.rounds if r.drafted] == [0.0] * len(fused.rounds)


def test_every_round_feeds_the_last_two_tokens(pair):
    _, draft = pair
    draft.calls.clear()
    prompt = random_prompt(6, seed=3)
    _, stats, _, fused = fused_text(*pair, prompt, 3, max_new_tokens=40)
    assert draft.calls[0] == ("prefill", 6, 0)
    assert [(rows, position) for method, rows, position in draft.calls[1:]] == [(2, start) for start, _ in fused.rounds]
    starts = [len(prompt) - 1]
    for r in stats.rounds[:-1]:
        starts.append(starts[-1] + r.emitted)
    assert [start for start, _ in fused.rounds] == starts[: len(fused.rounds)]
    assert {r.accepted for r in stats.rounds} >= {0, 3}


# -------------------------------------------------------------------------------- where no fused round fits
@pytest.mark.parametrize(("asked", "drafted"), [(1, 1), (2, 1), (3, 3), (6, 3), (7, 7), (31, 7)])
def test_of_the_lengths_that_there_are_programs_for_the_longest_allowed_is_drafted(pair, asked, drafted):
    prompt = random_prompt(6, seed=5)
    ids, stats, drafter, fused = fused_text(*pair, prompt, asked, lengths=(1, 3, 7), max_new_tokens=40)
    assert ids == plain(pair[0], prompt, max_new_tokens=40)
    assert not any(draft.tokens for draft in drafter.drafts)
    assert fused.rounds[0][1] == max(k for _, k in fused.rounds) == drafted


def test_a_length_below_all_programs_uses_part_of_the_shortest(pair):
    """As at the end of a text: the program is asked for fewer tokens than it drafts."""
    prompt = random_prompt(6, seed=5)
    ids, _, drafter, fused = fused_text(*pair, prompt, 2, lengths=(4,), max_new_tokens=30)
    assert ids == plain(pair[0], prompt, max_new_tokens=30)
    assert {k for _, k in fused.rounds[:-1]} == {2}
    assert not any(draft.tokens for draft in drafter.drafts)


def test_without_a_program_the_loop_verifies(pair):
    prompt = random_prompt(6, seed=5)
    ids, stats, drafter, fused = fused_text(*pair, prompt, 5, lengths=(), max_new_tokens=30)
    assert ids == plain(pair[0], prompt, max_new_tokens=30)
    assert fused.rounds == [] and not any(draft.fused for draft in drafter.drafts)
    assert outcomes(stats) == outcomes(speculate(*pair, prompt, 5, max_new_tokens=30)[2])


@pytest.mark.parametrize("context", [20, 21, 22, 23])
def test_the_end_of_the_drafts_context_shortens_then_ends_its_help(context):
    target, _ = build_pair(seed=0, noise=0.05)
    _, draft = build_pair(seed=0, noise=0.05, max_seq_len=context)
    prompt = random_prompt(7, seed=6)
    ids, stats, drafter, fused = fused_text(target, draft, prompt, max_new_tokens=40)
    assert ids == plain(target, prompt, max_new_tokens=40)
    assert max(position + 2 + k for position, k in fused.rounds) <= context + 1
    assert drafter.drafts[-1].tokens == [] and not drafter.drafts[-1].fused
    assert stats.rounds[-1].drafted == 0


def test_the_text_fills_the_targets_context_and_no_more():
    target, draft = build_pair(seed=1, noise=0.05, max_seq_len=40)
    prompt = random_prompt(7, seed=6)
    for k in (1, 4, 31):
        ids, stats, _, _ = fused_text(target, draft, prompt, k, max_new_tokens=1000)
        assert ids == plain(target, prompt, max_new_tokens=1000)
        assert (len(prompt) + len(ids), stats.finish_reason) == (40, "context")


class Pausing(FixedDraftLength):
    """Drafts nothing for `gap` rounds in between, so that the draft falls behind."""

    def __init__(self, k, gap):
        super().__init__(k)
        self.period, self.seen = gap + 1, 0

    def draft_length(self, source):
        return 0 if self.seen % self.period else self.k

    def update(self, round):
        self.seen += 1


@pytest.mark.parametrize("gap", [1, 2, 9, 40])
@pytest.mark.parametrize("noise", [0.0, 0.07])
def test_a_draft_that_is_further_behind_catches_up_before_its_round(gap, noise):
    """After 40 plain rounds what it lacks is more than the rows of one forward."""
    target, draft = build_pair(seed=0, noise=noise, max_seq_len=256)
    prompt = random_prompt(6, seed=4)
    draft.calls.clear()
    ids, stats, drafter, fused = fused_text(target, draft, prompt, controller=Pausing(3, gap), max_new_tokens=150)
    assert ids == plain(target, prompt, max_new_tokens=150)
    assert not any(draft.tokens for draft in drafter.drafts)
    read = [(position, rows) for method, rows, position in draft.calls if method == "greedy"]
    assert read and all(rows <= draft.max_rows for _, rows in read)
    assert any(rows == draft.max_rows for _, rows in read) == (gap == 40)
    assert all(position + rows <= start for (position, rows) in read for start, _ in fused.rounds if start >= position)
    if noise == 0:  # the same model: a hole in the draft's cache would make it propose something else
        assert all(r.accepted == r.drafted for r in stats.rounds)


def test_a_draft_in_the_targets_cache_is_never_behind(pair):
    """Early exit: with its own drafter nothing is read, neither the prompt nor what plain rounds have added."""
    target, _ = pair
    first = target.first_layers(1)
    prompt = random_prompt(6, seed=4)

    def refused(*arguments):
        raise AssertionError("nothing is to be read")

    first.prefill = first.greedy = refused
    stats, fused = GenerationStats(), ComposedRound(target, first)
    drafter = EarlyExit(target, 1, GREEDY, rounds=fused)
    drafter.model = first
    tokens = generate(target, drafter, prompt, controller=Pausing(3, 9), max_new_tokens=60, stats=stats)
    assert [token.id for token in tokens] == plain(target, prompt, max_new_tokens=60)
    assert len(fused.rounds) > 3
    assert {r.source for r in stats.rounds if r.drafted} == {"early-exit"}


def test_prompts_of_one_token(pair):
    for token in range(0, 64, 7):
        ids, _, _, fused = fused_text(*pair, [token], max_new_tokens=12)
        assert ids == plain(pair[0], [token], max_new_tokens=12)
        assert fused.rounds[0] == (0, 4)


def test_a_sequence_of_one_token_is_drafted_by_the_model_alone(pair):
    drafter, reader = ModelDrafter(pair[1], GREEDY, rounds=ComposedRound(*pair)), build_pair(seed=0, noise=0.07)[1]
    draft = drafter.propose([5], upto(3))
    assert draft.fused is None
    assert draft.tokens == ModelDrafter(reader, GREEDY).propose([5], upto(3)).tokens


def test_reading_the_prompt_is_reported_apart_and_once(pair):
    _, stats, drafter, _ = fused_text(*pair, random_prompt(6, seed=3), max_new_tokens=20)
    first, *others = (draft.prefill_s for draft in drafter.drafts)
    assert first > 0 and others == [0.0] * len(others)
    assert stats.draft_prefill_s == first


# ---------------------------------------------------------------------------------- stops, other ways to verify
@pytest.mark.parametrize("place", [0, 1, -1])
def test_nothing_follows_a_stop_token_in_a_block(pair, place):
    tried = 0
    for seed in range(30):
        prompt = random_prompt(5, seed)
        ids, stats, _, _ = fused_text(*pair, prompt, max_new_tokens=40)
        start = 1
        for r in stats.rounds:
            index = start + (place if place >= 0 else r.emitted - 1)
            if r.emitted >= 3 and not r.cut and ids.index(ids[index]) == index:
                options = {"max_new_tokens": 40, "stop_ids": (ids[index],)}
                stopped, stopped_stats, _, _ = fused_text(*pair, prompt, **options)
                assert stopped == ids[: index + 1] == plain(pair[0], prompt, **options)
                assert stopped_stats.finish_reason == "stop"
                assert stopped_stats.rounds[-1].cut == (place >= 0)
                tried += 1
                break
            start += r.emitted
    assert tried >= 5


class Lying(ComposedRound):
    """A round whose verification is wrong: whoever believes it writes another text."""

    def run(self, tokens, position, k):
        drafted, verified, _ = super().run(tokens, position, k)
        return drafted, [(id + 1) % 64 for id in verified], 0


def text_of_a_lie(pair, prompt, **options):
    drafter = ModelDrafter(pair[1], GREEDY, rounds=Lying(*pair))
    return [token.id for token in generate(pair[0], drafter, prompt, max_new_tokens=30, **options)]


def test_sequential_verification_asks_the_target_itself(pair):
    prompt = random_prompt(6, seed=3)
    expected = plain(pair[0], prompt, max_new_tokens=30)
    assert text_of_a_lie(pair, prompt) != expected
    assert text_of_a_lie(pair, prompt, verification="sequential") == expected


@pytest.mark.parametrize("verification", ["batched", "sequential"])
def test_sampling_asks_the_target_itself(pair, verification):
    """Greedy drafts under sampling are lossless, and the text depends on the drafts alone, not on who made them."""
    options = {"sampling": SamplingParams(temperature=0.9, top_k=20, seed=5), "verification": verification}
    for seed in range(5):
        prompt = random_prompt(6, seed)
        greedy_drafts = generate(pair[0], ModelDrafter(pair[1], GREEDY), prompt, max_new_tokens=30, **options)
        assert text_of_a_lie(pair, prompt, **options) == [token.id for token in greedy_drafts]
