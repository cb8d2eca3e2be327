"""The loop with real tiny models: greedy text, verification, where a text ends."""

import itertools

import pytest

from models.errors import UserError
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters.model import ModelDrafter
from models.speculative.generate import generate
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import GREEDY, build_pair, plain, random_prompt, speculate


@pytest.fixture(scope="module")
def pair():
    """A pair whose rounds end in every possible way."""
    return build_pair(seed=0, noise=0.07)


# -------------------------------------------------------------------------------------------------- lossless
@pytest.mark.parametrize("noise", [0.0, 0.03, 0.07, 0.15, None])
def test_speculative_greedy_equals_plain_greedy(noise):
    """5 kinds of draft x 3 pairs x 3 prompts x K 1..8 = 360 cases."""
    rounds = []
    for seed in range(3):
        target, draft = build_pair(seed, noise)
        for number, length in enumerate((1, 5, 40)):
            prompt = random_prompt(length, seed=10 * seed + number)
            expected = plain(target, prompt, max_new_tokens=16)
            for k in range(1, 9):
                ids, _, stats = speculate(target, draft, prompt, k, max_new_tokens=16)
                assert ids == expected, (seed, length, k)
                rounds += [r for r in stats.rounds if r.drafted and not r.cut]
    none = sum(r.accepted == 0 for r in rounds)
    whole = sum(r.accepted == r.drafted for r in rounds)
    part = len(rounds) - none - whole
    if noise == 0:
        assert whole == len(rounds) > 0
    elif noise is None:
        assert none > 0.9 * len(rounds)
    else:
        assert min(none, part, whole) > 10, (none, part, whole)


def test_bf16_with_fixed_rows_is_exact_too():
    for seed in range(3):
        target, draft = build_pair(seed, noise=0.07, dtype="bf16", fixed_rows=8)
        prompt = random_prompt(6, seed)
        expected = plain(target, prompt, max_new_tokens=60)
        for k in (1, 3, 7):
            assert speculate(target, draft, prompt, k, max_new_tokens=60)[0] == expected


@pytest.mark.parametrize("k", [1, 3, 8])
def test_sequential_verification_writes_the_same_one_token_per_forward(pair, k):
    target, draft = pair
    prompt = random_prompt(6, seed=3)
    expected, origins, batched = speculate(target, draft, prompt, k, max_new_tokens=30)
    target.calls.clear()
    ids, same_origins, stats = speculate(target, draft, prompt, k, max_new_tokens=30, verification="sequential")
    assert (ids, same_origins) == (expected, origins)
    assert [r.accepted for r in stats.rounds] == [r.accepted for r in batched.rounds]
    forwards = [call for call in target.calls if call[0] == "greedy"]
    assert forwards == [("greedy", 1, len(prompt) + i) for i in range(29)]


def test_batched_verification_is_one_forward_per_round(pair):
    target, draft = pair
    prompt = random_prompt(6, seed=3)
    target.calls.clear()
    _, _, stats = speculate(target, draft, prompt, 4, max_new_tokens=30)
    starts = itertools.accumulate((r.emitted for r in stats.rounds), initial=len(prompt))
    assert target.calls == [("prefill", 6, 0)] + [
        ("greedy", r.drafted + 1, start) for r, start in zip(stats.rounds, starts, strict=False)
    ]


class Alternating(FixedDraftLength):
    """Drafts nothing for `gap` rounds in between, so that the draft falls behind."""

    def __init__(self, k: int, gap: int):
        super().__init__(k)
        self.period, self.seen = gap + 1, []

    def draft_length(self, source: str) -> int:
        return 0 if len(self.seen) % self.period else self.k

    def update(self, round) -> None:
        self.seen.append((round.drafted, round.accepted, round.emitted))


@pytest.mark.parametrize("noise", [0.0, 0.07])
@pytest.mark.parametrize("gap", [1, 9, 33])
def test_a_controller_may_switch_drafting_off_and_on(gap, noise):
    target, draft = build_pair(seed=0, noise=noise, max_seq_len=256)
    prompt, stats = random_prompt(6, seed=4), GenerationStats()
    controller = Alternating(3, gap)
    drafter = ModelDrafter(draft, GREEDY)
    tokens = list(generate(target, drafter, prompt, controller=controller, max_new_tokens=90, stats=stats))
    assert [token.id for token in tokens] == plain(target, prompt, max_new_tokens=90)
    assert controller.seen == [(r.drafted, r.accepted, r.emitted) for r in stats.rounds]
    assert {r.drafted for r in stats.rounds} >= {0, 3}
    assert sum(token.origin == "plain" for token in tokens) == sum(r.drafted == 0 for r in stats.rounds) > 10
    if noise == 0:  # the same model: catching up leaves no hole, or it would propose something else
        assert stats.acceptance_rate == 1


def test_origins_tell_where_each_token_came_from(pair):
    target, draft = pair
    ids, origins, stats = speculate(target, draft, random_prompt(6, seed=3), 3, max_new_tokens=60)
    expected = ["prefill"]
    for r in stats.rounds:
        end = "plain" if not r.drafted else "bonus" if r.accepted == r.drafted else "corrected"
        expected += ["drafted"] * r.accepted + [end]
    assert origins == expected
    assert set(origins) >= {"prefill", "drafted", "bonus", "corrected"}
    assert {token.origin for token in generate(target, None, [1, 2], max_new_tokens=9)} == {"prefill", "plain"}


def test_the_drafter_waits_until_the_first_token_is_out(pair):
    target, draft = pair
    draft.calls.clear()
    tokens = generate(target, ModelDrafter(draft, GREEDY), [1, 2, 3], max_new_tokens=8)
    assert next(tokens).origin == "prefill"
    assert draft.calls == []
    next(tokens)
    assert draft.calls[0] == ("prefill", 3, 0)


def test_the_draft_is_fed_what_it_lacks_and_nothing_twice(pair):
    target, draft = pair
    draft.calls.clear()
    _, _, stats = speculate(target, draft, random_prompt(6, seed=3), 3, max_new_tokens=40)
    drafting = [r for r in stats.rounds if r.drafted]
    expected = [1] + [2 if r.accepted == r.drafted else 1 for r in drafting[:-1]]
    assert [rows for method, rows, _ in draft.calls if method == "draft_greedy"] == expected
    assert {1, 2} == set(expected)


# ----------------------------------------------------------------------------------------------- where it ends
@pytest.mark.parametrize("limit", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("k", [1, 4, 8, 31])
def test_draft_longer_than_what_is_left(pair, k, limit):
    target, draft = pair
    prompt = random_prompt(6, seed=5)
    ids, _, stats = speculate(target, draft, prompt, k, max_new_tokens=limit)
    assert ids == plain(target, prompt, max_new_tokens=limit)
    assert (len(ids), stats.tokens, stats.finish_reason) == (limit, limit, "length")
    left = limit - 1
    for r in stats.rounds:
        assert r.drafted == min(k, left - 1)
        assert r.cut == (k > left - 1)
        left -= r.emitted
    assert left == 0


@pytest.mark.parametrize("k", [0, 1, 4, 8, 31])
@pytest.mark.parametrize("fixed_rows", [None, 8])
def test_text_fills_the_context_and_no_more(fixed_rows, k):
    target, draft = build_pair(seed=1, noise=0.05, max_seq_len=40, fixed_rows=fixed_rows)
    prompt = random_prompt(7, seed=6)
    expected = plain(target, prompt, max_new_tokens=1000)
    ids, _, stats = speculate(target, draft, prompt, k, max_new_tokens=1000)
    assert ids == expected
    assert len(prompt) + len(ids) == 40
    assert stats.finish_reason == "context"
    longer, _ = build_pair(seed=1, noise=0.05, max_seq_len=100)
    assert plain(longer, prompt, max_new_tokens=33) == expected
    assert speculate(target, draft, prompt, k, max_new_tokens=33)[2].finish_reason == "length"


def test_a_prompt_one_short_of_the_context_gives_one_token():
    target, draft = build_pair(seed=1, noise=0.05, max_seq_len=40)
    ids, origins, stats = speculate(target, draft, random_prompt(39, seed=6), max_new_tokens=10)
    assert (len(ids), origins, stats.finish_reason, stats.rounds) == (1, ["prefill"], "context", [])


def test_a_draft_with_a_smaller_context_only_stops_helping():
    target, _ = build_pair(seed=0, noise=0.05)
    _, draft = build_pair(seed=0, noise=0.05, max_seq_len=20)
    prompt = random_prompt(7, seed=6)
    ids, origins, _ = speculate(target, draft, prompt, max_new_tokens=40)
    assert ids == plain(target, prompt, max_new_tokens=40)
    assert "drafted" in origins[:15]
    assert set(origins[15:]) == {"plain"}


def placed_stop(target, draft, k: int, place: str):
    """(prompt, text, index of a token that first occurs there): `place` in a block of >= 3 tokens, or "prefill"."""
    for seed in range(200):
        prompt = random_prompt(5, seed)
        ids, _, stats = speculate(target, draft, prompt, k, max_new_tokens=40)
        if place == "prefill":
            return prompt, ids, 0
        start = 1
        for r in stats.rounds:
            index = start + {"first": 0, "middle": 1, "last": r.emitted - 1}[place]
            if r.emitted >= 3 and not r.cut and ids.index(ids[index]) == index:
                return prompt, ids, index
            start += r.emitted
    raise AssertionError(f"no text has a new token at the {place} of a block")


@pytest.mark.parametrize("place", ["prefill", "first", "middle", "last"])
@pytest.mark.parametrize("verification", ["batched", "sequential"])
def test_nothing_follows_a_stop_token(pair, place, verification):
    target, draft = pair
    prompt, text, index = placed_stop(target, draft, 4, place)
    absent = next(token for token in range(64) if token not in text)
    options = {"max_new_tokens": 40, "stop_ids": (absent, text[index])}
    ids, _, stats = speculate(target, draft, prompt, 4, verification=verification, **options)
    assert ids == text[: index + 1] == plain(target, prompt, **options)
    assert (stats.tokens, stats.finish_reason) == (index + 1, "stop")
    assert sum(r.emitted for r in stats.rounds) == index
    if place != "prefill":
        last = stats.rounds[-1]
        assert last.cut == (place != "last")
        assert last.emitted == {"first": 1, "middle": 2, "last": last.accepted + 1}[place]


@pytest.mark.parametrize("k", [0, 1, 4])
def test_prompt_of_one_token(pair, k):
    target, draft = pair
    for token in range(0, 64, 7):
        ids, _, _ = speculate(target, draft, [token], k, max_new_tokens=12)
        assert ids == plain(target, [token], max_new_tokens=12)


@pytest.mark.parametrize("change, named", [
    ({"prompt": []}, "prompt is empty"), ({"prompt": [1] * 128}, "prompt has 128 tokens, context is 128"),
    ({"prompt": [1] * 500}, "prompt has 500 tokens"), ({"prompt": [3, 64]}, "vocabulary is 64"),
    ({"prompt": [-1]}, "vocabulary is 64"), ({"max_new_tokens": 0}, "max_new_tokens 0"),
    ({"verification": "lazy"}, "'lazy'"),
])  # fmt: skip
def test_wrong_arguments_are_refused_at_the_call_in_one_line(pair, change, named):
    arguments = {"prompt": [1, 2], **change}
    with pytest.raises(UserError, match=named) as error:
        generate(pair[0], None, **arguments)
    assert "\n" not in str(error.value)
