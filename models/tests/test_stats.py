"""The definitions of the numbers, on rounds made by hand."""

import pytest

from models.speculative.stats import GenerationStats, Round


def example() -> GenerationStats:
    rounds = [
        Round(drafted=4, accepted=4, emitted=5, draft_s=0.010, verify_s=0.020, host_s=0.001),
        Round(drafted=4, accepted=0, emitted=1, draft_s=0.010, verify_s=0.020, host_s=0.001),
        Round(drafted=4, accepted=2, emitted=3, draft_s=0.010, verify_s=0.020, host_s=0.001),
        Round(drafted=2, accepted=2, emitted=3, draft_s=0.006, verify_s=0.016, host_s=0.001),
        Round(drafted=0, accepted=0, emitted=1, draft_s=0.000, verify_s=0.012, host_s=0.001),  # plain
        Round(drafted=4, accepted=4, emitted=2, draft_s=0.010, verify_s=0.020, host_s=0.001, cut=True),
    ]
    decode_s = 0.012 + sum(r.draft_s + r.verify_s + r.host_s for r in rounds)
    return GenerationStats(
        prompt_tokens=7, tokens=16, ttft_s=0.5, draft_prefill_s=0.012, decode_s=decode_s, rounds=rounds,
        finish_reason="stop",
    )  # fmt: skip


def test_rates_follow_their_definitions():
    stats = example()
    assert stats.decode_tokens == 15 == sum(r.emitted for r in stats.rounds)
    assert stats.tok_s == pytest.approx(15 / 0.172)
    assert stats.acceptance_rate == pytest.approx(8 / 14)
    assert stats.mean_acceptance_length == pytest.approx(1 + 8 / 4)
    assert stats.acceptance_by_position == pytest.approx([3 / 4, 3 / 4, 1 / 3, 1 / 3])
    assert stats.mean_acceptance_length != pytest.approx(1 + sum(stats.acceptance_by_position))  # ragged drafts


def test_times_are_means_over_the_rated_rounds():
    stats = example()
    assert stats.draft_ms == pytest.approx((10 + 10 + 10 + 6) / 4)
    assert stats.verify_ms == pytest.approx((20 + 20 + 20 + 16) / 4)
    assert stats.host_ms == pytest.approx(1)
    assert stats.host_share == pytest.approx(0.006 / 0.160)


def test_plain_decoding_has_step_times_and_no_acceptance():
    stats = GenerationStats(tokens=4, decode_s=0.3, rounds=[Round(0, 0, 1, 0.0, 0.09, 0.01) for _ in range(3)])
    assert (stats.acceptance_rate, stats.mean_acceptance_length, stats.acceptance_by_position) == (0, 1, [])
    assert (stats.draft_ms, stats.verify_ms, stats.host_ms) == pytest.approx((0, 90, 10))
    assert stats.tok_s == pytest.approx(10)


def test_nothing_happened_gives_zeros_not_errors():
    stats = GenerationStats()
    assert (stats.decode_tokens, stats.tok_s, stats.host_share, stats.verify_ms) == (0, 0, 0, 0)
    assert GenerationStats.merge([]).tokens == 0
    assert GenerationStats.merge([]).tok_s == 0


def test_merging_adds_counts_and_averages_the_first_token():
    one, other = example(), GenerationStats(prompt_tokens=3, tokens=2, ttft_s=0.1, decode_s=0.012, finish_reason="stop")
    other.rounds = [Round(4, 0, 1, 0.004, 0.006, 0.002)]
    unborn = GenerationStats(prompt_tokens=5, finish_reason="stop")  # stopped before its first token
    both = GenerationStats.merge([one, other, unborn])
    assert (both.prompt_tokens, both.tokens, both.decode_tokens) == (15, 18, 16)
    assert both.ttft_s == pytest.approx(0.3)
    assert both.tok_s == pytest.approx(16 / 0.184)
    assert both.acceptance_rate == pytest.approx(8 / 18)
    assert both.mean_acceptance_length == pytest.approx(1 + 8 / 5)
    assert both.finish_reason == "stop"
    assert GenerationStats.merge([both, GenerationStats(tokens=1, finish_reason="length")]).finish_reason == ""
    third = GenerationStats(tokens=1, ttft_s=0.9)
    flat = GenerationStats.merge([one, other, third])
    nested = GenerationStats.merge([GenerationStats.merge([one, other]), third])
    assert nested.ttft_s == pytest.approx(flat.ttft_s) == pytest.approx(0.5)
    assert nested.decode_tokens == flat.decode_tokens == 16
    assert len(one.rounds) == 6
