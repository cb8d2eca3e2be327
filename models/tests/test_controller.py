"""The controller's rules, on rounds and times made up here; how it does on real models is scripts/benchmark.py's."""

import random

import pytest

from models.errors import UserError
from models.speculative.control.policy import AutoDraftLength
from models.speculative.formulas import expected_tokens
from models.speculative.stats import Round

PLAIN_S = 0.010


class World:
    """Generations with known costs and chances of acceptance, by the seconds they would take."""

    def __init__(self, controller, chance, draft_s=0.001, extra_row_s=0.0, prefill_s=0.0, seed=0):
        self.controller, self.chance, self.draft_s = controller, chance, draft_s
        self.extra_row_s, self.prefill_s = extra_row_s, prefill_s
        self.random = random.Random(seed)

    def generate(self, tokens, prompt_tokens=10):
        """Seconds for so many tokens."""
        controller, seconds, emitted, read = self.controller, 0.0, 1, False
        controller.begin(prompt_tokens, tokens)
        while emitted < tokens:
            k = controller.draft_length("model")
            if k and not read:
                read = True
                seconds += self.prefill_s
                controller.read("model", self.prefill_s)
            accepted = 0
            while accepted < k and self.random.random() < self.chance:
                accepted += 1
            done = Round(k, accepted, accepted + 1, k * self.draft_s, PLAIN_S + k * self.extra_row_s)
            controller.update(done)
            seconds += done.draft_s + done.verify_s
            emitted += done.emitted
        return seconds


def plain_seconds(tokens):
    return (tokens - 1) * PLAIN_S


def fixed_seconds(k, chance, tokens, draft_s=0.001, extra_row_s=0.0):
    """On average."""
    rounds = (tokens - 1) / expected_tokens([chance] * k)
    return rounds * (PLAIN_S + k * (draft_s + extra_row_s))


def test_the_first_rounds_draft_before_anything_is_known():
    controller = AutoDraftLength()
    controller.begin(10, 50)
    assert controller.draft_length("model") == 0  # nothing has been timed
    controller.update(Round(0, 0, 1, verify_s=PLAIN_S))
    assert controller.draft_length("model") > 0


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.85, 0.95])
@pytest.mark.parametrize("draft_s", [0.0005, 0.002, 0.005])
def test_nearly_as_fast_as_the_best_fixed_length(chance, draft_s):
    """Worst where drafting gains less than a tenth: there chance decides how long it stays with plain decoding."""
    tokens, seeds = 1000, range(8)
    best = min(fixed_seconds(k, chance, tokens, draft_s) for k in range(7))
    mean = sum(World(AutoDraftLength(), chance, draft_s, seed=seed).generate(tokens) for seed in seeds) / len(seeds)
    assert mean < 1.08 * best


def test_rows_that_cost_time_make_drafts_shorter():
    def drafted(extra_row_s):
        controller = AutoDraftLength()
        World(controller, 0.7, extra_row_s=extra_row_s).generate(1000)
        return sum(controller.chosen) / len(controller.chosen)

    assert drafted(0.003) < drafted(0.0) - 1


def test_where_nothing_is_accepted_it_decodes_plainly_within_20_rounds_and_loses_little():
    controller = AutoDraftLength()
    seconds = World(controller, 0.0).generate(500)
    assert 0 in controller.chosen[1:20]
    assert sum(k > 0 for k in controller.chosen[:20]) <= 15
    assert sum(k > 0 for k in controller.chosen[20:]) <= len(controller.chosen) // 20
    assert seconds < 1.02 * plain_seconds(500)


def test_plain_rounds_do_not_look_at_all_lengths_each_time(monkeypatch):
    controller, asked = AutoDraftLength(), []
    world = World(controller, 0.0)
    world.generate(100)
    right = controller.round_s
    monkeypatch.setattr(controller, "round_s", lambda *args: asked.append(args) or right(*args))
    world.generate(100)
    assert len(asked) < 100 * len(controller.lengths) / 4


def test_a_draft_that_could_never_pay_is_left_alone():
    world = World(AutoDraftLength(), 1.0, draft_s=0.02)
    world.generate(50)
    assert world.generate(300) < 1.02 * plain_seconds(300)


def test_probes_find_out_that_drafting_pays_again():
    controller = AutoDraftLength()
    world = World(controller, 0.0)
    world.generate(100)
    assert controller.chosen[-1] == 0
    controller.begin(10, 10_000)
    for _ in range(300):
        k = controller.draft_length("model")
        controller.read("model", 0.0)
        controller.update(Round(k, 0, 1, k * 0.001, PLAIN_S))
    probes = sum(k > 0 for k in controller.chosen[50:])
    world.chance = 1.0
    for _ in range(400):
        k = controller.draft_length("model")
        controller.update(Round(k, k, k + 1, k * 0.001, PLAIN_S))
    assert probes >= 1
    assert controller.chosen[-1] == 6


def test_probes_cost_at_most_one_percent():
    controller = AutoDraftLength()
    world = World(controller, 0.0, draft_s=0.004)
    world.generate(60)
    controller.begin(10, 100_000)
    for _ in range(30):
        k = controller.draft_length("model")
        controller.update(Round(k, 0, 1, k * 0.004, PLAIN_S))
    controller.read("model", 0.0)
    spent = total = 0.0
    for _ in range(3000):
        k = controller.draft_length("model")
        done = Round(k, 0, 1, k * 0.004, PLAIN_S)
        controller.update(done)
        spent, total = spent + done.draft_s, total + done.draft_s + done.verify_s
    assert 0 < spent <= 0.01 * total


def test_trials_pay_for_what_the_draft_has_to_catch_up_with():
    controller = AutoDraftLength()
    per_token_s, unread, spent, total = 0.0005, 100, 0.0, 0.0
    controller.begin(unread, 100_000)
    for _ in range(3000):
        k = controller.draft_length("model")
        reading = unread * per_token_s if k else 0.0
        if k:
            controller.read("model", reading)
        controller.update(Round(k, 0, 1, k * 0.004, PLAIN_S))
        unread = 0 if k else unread + 1
        spent += reading + k * 0.004
        total += reading + k * 0.004 + PLAIN_S
    assert controller.chosen.count(0) > 2950
    assert 0.001 * total < spent <= 0.014 * total  # the first drafts, before anything was known, included


def test_a_long_prompt_is_not_read_for_a_few_tokens():
    controller = AutoDraftLength()
    World(controller, 0.7, prefill_s=0.05).generate(50, prompt_tokens=100)
    assert controller.costs.prefill_s("model") == pytest.approx(0.05 / 101)  # and one token had been emitted
    seconds = World(controller, 0.7, prefill_s=0.5).generate(8, prompt_tokens=1000)
    assert set(controller.chosen) == {0}
    assert seconds == pytest.approx(plain_seconds(8))
    World(controller, 0.7, prefill_s=0.005).generate(8, prompt_tokens=10)
    assert max(controller.chosen) > 0


def test_what_the_draft_holds_of_a_prompt_need_not_be_earned_again():
    """As of a conversation: all of it but the last question was read for the answer before."""
    controller = AutoDraftLength()
    World(controller, 0.7, prefill_s=0.05).generate(50, prompt_tokens=100)
    lengths = []
    for held in (0, 990):
        policy = controller.begin(1000, 8)
        policy.holds(held)
        lengths.append(policy.draft_length("model"))
    assert lengths[0] == 0 < lengths[1]
    policy.read("model", 0.02)
    assert controller.costs.prefill_s("model") == pytest.approx((0.05 / 101 + 0.02 / 10) / 2)  # the median of both


def test_sources_are_learnt_apart():
    controller = AutoDraftLength()
    controller.begin(10, 1000)
    for _ in range(30):
        for source, accepts in (("lookup", True), ("model", False)):
            k = controller.draft_length(source) or 1
            controller.update(Round(k, k * accepts, 1 + k * accepts, 0.001 * k, PLAIN_S, source=source))
    assert controller.draft_length("lookup") == 6
    assert controller.draft_length("model") == 0


def test_a_generation_begins_with_what_those_before_it_had():
    good, bad = AutoDraftLength(), AutoDraftLength()
    for controller, chance in ((good, 0.95), (bad, 0.05)):
        for seed in range(6):
            World(controller, chance, draft_s=0.003, seed=seed).generate(100)
        controller.begin(10, 100)
    assert good.draft_length("model") > bad.draft_length("model")


def test_break_even_is_that_of_what_drafted():
    controller = AutoDraftLength()
    assert controller.report()["break_even"] is None
    controller.begin(10, 100)
    controller.update(Round(0, 0, 1, verify_s=PLAIN_S))
    assert controller.report()["break_even"] is None
    controller.update(Round(2, 1, 2, draft_s=0.9, verify_s=PLAIN_S, source="lookup"))
    assert controller.report()["break_even"] is None  # the first draft, which may have had to prepare something
    controller.update(Round(2, 1, 2, draft_s=0.002, verify_s=PLAIN_S, source="lookup"))
    assert controller.report()["break_even"] == pytest.approx(0.1)


@pytest.mark.parametrize(("lengths", "wrong"), [([-1, 2], -1), ([4, 32], 32)])
def test_lengths_outside_a_tile_are_refused(lengths, wrong):
    with pytest.raises(UserError, match=f"draft length {wrong}: must be between 0 and 31"):
        AutoDraftLength(lengths)


def test_only_the_offered_lengths_are_chosen():
    controller = AutoDraftLength([1, 3, 7])
    World(controller, 0.8).generate(500)
    assert set(controller.chosen) <= {0, 1, 2, 3, 7}
    assert 7 in controller.chosen or 3 in controller.chosen


def test_break_even_is_the_price_of_a_token_over_that_of_a_step():
    controller = AutoDraftLength()
    assert controller.break_even() is None
    World(controller, 0.5, draft_s=0.002).generate(300)
    assert controller.break_even() == pytest.approx(0.2, rel=0.01)
    report = controller.report()
    assert report["lengths"] == list(range(7))
    assert report["verify_ms"]["1" if 0 in controller.chosen else "2"] == pytest.approx(10.0)
    assert report["draft_step_ms"] == {"model": pytest.approx(2.0)}
    assert len(report["acceptance"]["model"]) == 6


def taught(chance, draft_s=0.002, extra_row_s=0.0005, rounds=200):
    """A controller in a text whose draft it knows."""
    controller = AutoDraftLength()
    world = World(controller, chance, draft_s, extra_row_s)
    world.generate(rounds)
    controller.begin(10, 1000)
    controller.read("model", 0.0)
    controller.update(Round(2, 1, 2, 2 * draft_s, PLAIN_S + 2 * extra_row_s))
    return controller


def test_a_further_token_pays_from_the_chance_at_which_its_time_would_give_as_much_otherwise():
    controller = taught(0.6)
    pace = controller._outlook("model").best
    row_s = controller.costs.verify_s(4) - controller.costs.verify_s(3)
    assert not controller.pays("model", 0.98 * row_s * pace, 0, 4)
    assert controller.pays("model", 1.02 * row_s * pace, 0, 4)
    step = (row_s + controller.costs.draft_s("model")) * pace / controller._of("model").next_chance()
    assert not controller.pays("model", 0.98 * step, 1, 4)
    assert controller.pays("model", 1.02 * step, 1, 4)


def test_probabilities_that_have_proved_too_high_count_for_less():
    controller = taught(0.6)
    reach = 1.5 * (controller.costs.verify_s(4) - controller.costs.verify_s(3)) * controller._outlook("model").best
    assert controller.pays("model", reach, 0, 4)
    for _ in range(100):
        controller.update(Round(2, 1, 2, 0.004, PLAIN_S + 0.001, path_probs=(0.99, 0.98)))
        controller.update(Round(2, 0, 1, 0.004, PLAIN_S + 0.001, path_probs=(0.99, 0.98)))
    assert not controller.pays("model", reach, 0, 4)


def test_a_source_leaves_the_round_to_one_that_promises_more():
    controller = AutoDraftLength()
    controller.begin(10, 10_000)
    controller.read("model", 0.0)
    for _ in range(40):
        controller.update(Round(0, 0, 1, verify_s=PLAIN_S))
        controller.update(Round(4, 4, 5, 0.004, PLAIN_S, source="model"))
        controller.update(Round(4, 1, 2, 0.0001, PLAIN_S, source="lookup"))
    assert controller.draft_length("lookup") == 0
    assert controller.draft_length("model") > 0
    for _ in range(100):
        controller.update(Round(4, 4, 5, 0.0001, PLAIN_S, source="lookup"))
    assert controller.draft_length("lookup") > 0
    assert controller.draft_length("model") > 0  # though copies promise more: it is asked where there are none
    for _ in range(100):
        controller.update(Round(4, 0, 1, 0.004, PLAIN_S, source="model"))
    assert controller.draft_length("lookup") > 0


def test_it_tries_again_in_a_later_text_though_the_draft_has_yet_to_read_it():
    """A run in which nothing was accepted for long, and then everything would be."""
    controller = AutoDraftLength()
    world = World(controller, 0.0, prefill_s=0.02)
    for _ in range(6):
        world.generate(100)
    assert set(controller.chosen[5:]) <= {0, 1}
    world.chance = 1.0
    for _ in range(40):
        world.generate(100)
    assert controller.chosen[-1] > 0


def test_levels_of_a_tree_are_chosen_with_the_rows_that_it_verifies():
    controller = AutoDraftLength()
    controller.begin(10, 10_000)
    controller.read("tree", 0.0)
    for rows, seconds in ((1, PLAIN_S), (16, 2 * PLAIN_S)):
        controller.costs.add("verify", rows, seconds)
    parents = (-1, 0, -1, 0, 1, -1, 2, -1)
    for _ in range(60):
        controller.update(Round(8, 1, 2, 0.003, 1.5 * PLAIN_S, source="tree", parents=parents))
    assert controller.costs.draft_s("tree") == pytest.approx(0.001)  # three levels
    outlook = controller._outlook("tree")
    assert outlook.best == pytest.approx(
        expected_tokens(controller._of("tree").chances(outlook.length))
        / (0.001 * outlook.length + controller.costs.verify_s(9))
    )
