"""What the loop counts and clocks, with real tiny models: interruption, and who is charged for which second."""

import time

import pytest

from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters.model import ModelDrafter
from models.speculative.generate import generate
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import GREEDY, build_pair, random_prompt, speculate


@pytest.fixture(scope="module")
def pair():
    return build_pair(seed=0, noise=0.07)


@pytest.mark.parametrize("taken", range(1, 12))
def test_closing_early_leaves_true_statistics(pair, taken):
    target, draft = pair
    prompt, stats = random_prompt(6, seed=3), GenerationStats()
    ids, _, whole = speculate(target, draft, prompt, 4, max_new_tokens=12)
    assert whole.rounds[-1].emitted > 1  # so that the last block is interrupted, too
    tokens = generate(target, ModelDrafter(draft, GREEDY), prompt, max_new_tokens=12, stats=stats)
    assert [next(tokens).id for _ in range(taken)] == ids[:taken]
    assert stats.finish_reason == ""
    tokens.close()
    assert (stats.tokens, stats.finish_reason, stats.prompt_tokens) == (taken, "interrupted", 6)
    assert sum(r.emitted for r in stats.rounds) == taken - 1
    for r, same in zip(stats.rounds, whole.rounds, strict=False):
        assert r.cut == (same.cut or r.emitted < same.emitted)


def test_an_interrupt_inside_a_forward_leaves_true_statistics():
    target, draft = build_pair(seed=0, noise=0.07)
    for fail_at, tokens in ((1, 0), (2, 1), (5, None)):
        stats = GenerationStats()
        target.fail_at, target.calls = fail_at, []
        with pytest.raises(KeyboardInterrupt):
            list(generate(target, ModelDrafter(draft, GREEDY), [1, 2, 3], stats=stats))
        assert stats.finish_reason == "interrupted"
        assert stats.tokens == (1 + sum(r.emitted for r in stats.rounds) if tokens is None else tokens)
        assert len(stats.rounds) == max(fail_at - 2, 0)
        assert not any(r.cut for r in stats.rounds)


def test_breaking_off_at_the_last_token_is_no_interruption(pair):
    target, draft = pair
    stats = GenerationStats()
    tokens = generate(target, ModelDrafter(draft, GREEDY), [1, 2, 3], max_new_tokens=9, stats=stats)
    for _ in range(9):
        next(tokens)
    assert stats.finish_reason == "length"
    tokens.close()
    assert (stats.finish_reason, stats.tokens) == ("length", 9)


def test_time_in_the_consumer_is_not_counted(pair):
    target, draft = pair
    stats, pause = GenerationStats(), 0.02
    tokens = generate(target, ModelDrafter(draft, GREEDY), [1, 2, 3], max_new_tokens=12, stats=stats)
    time.sleep(pause)  # before the first token is asked for: no part of ttft_s
    began = time.perf_counter()
    for _ in tokens:
        time.sleep(pause)
    assert stats.decode_s > 0 < stats.ttft_s
    assert stats.ttft_s + stats.decode_s <= time.perf_counter() - began - 12 * pause


class Clock:
    """Stands in for the module `time`: a second passes when the test says so, a microsecond at each look."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("models.speculative.generate.time", self)
        monkeypatch.setattr("models.speculative.drafters.model.time", self)

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def slow(self, instance, method: str) -> None:
        """Each call of the method takes one second from now on."""
        call = getattr(instance, method)

        def slowed(*arguments):
            self.now += 1
            return call(*arguments)

        setattr(instance, method, slowed)


@pytest.mark.parametrize("verification", ["batched", "sequential"])
@pytest.mark.parametrize("part", ["prefill", "draft_prefill", "draft", "verify", "host", "consumer"])
def test_each_second_is_charged_to_who_spent_it(monkeypatch, part, verification):
    clock, stats = Clock(monkeypatch), GenerationStats()
    (target, draft), controller = build_pair(seed=0, noise=0.07), FixedDraftLength(4)
    slow = {
        "prefill": (target, "read_prompts"),
        "draft_prefill": (draft, "prefill"),
        "draft": (draft, "draft_greedy"),
        "verify": (target, "greedy"),
        "host": (controller, "update"),
    }
    if part in slow:
        clock.slow(*slow[part])
    options = {"controller": controller, "max_new_tokens": 20, "verification": verification, "stats": stats}
    for _ in generate(target, ModelDrafter(draft, GREEDY), [1, 2, 3], **options):
        clock.now += part == "consumer"
    rounds = stats.rounds
    spent = {
        "prefill": stats.ttft_s,
        "draft_prefill": stats.draft_prefill_s,
        "draft": sum(r.draft_s for r in rounds),
        "verify": sum(r.verify_s for r in rounds),
        "host": sum(r.host_s for r in rounds),
    }
    calls = {"draft": sum(r.drafted > 0 for r in rounds), "host": len(rounds), "verify": len(rounds)}
    if verification == "sequential":
        calls["verify"] = sum(r.emitted for r in rounds)
    expected = {name: calls.get(name, 1) * (name == part) for name in spent}
    assert spent == pytest.approx(expected, abs=1e-3)
    assert stats.decode_s == pytest.approx(sum(spent.values()) - stats.ttft_s, abs=1e-9)
    assert all(min(r.verify_s, r.host_s) > 0 <= r.draft_s for r in rounds)
