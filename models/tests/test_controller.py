"""The controller's rules, on rounds and times made up here; how it does on real models is scripts/benchmark.py's."""

import random
import statistics

import pytest

from models.errors import UserError
from models.speculative.control.costs import CostModel
from models.speculative.control.estimates import Acceptance, Trust
from models.speculative.control.policy import AutoDraftLength
from models.speculative.formulas import expected_tokens, tokens_by_length
from models.speculative.stats import Joint, Round
from models.tests.engine_fixtures import build_pair

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


# ---- costs ----------------------------------------------------------------------------------------------------------


def test_a_cost_is_a_median_that_outliers_do_not_move():
    costs = CostModel()
    for seconds in (1.0, 1.1, 50.0, 0.9, 1.0):
        costs.add("verify", 1, seconds)
    assert costs.verify_s(1) == 1.0


def test_a_cost_follows_a_machine_that_has_become_slower():
    costs = CostModel()
    for _ in range(100):
        costs.add("verify", 1, 1.0)
    for _ in range(CostModel.KEPT):
        costs.add("verify", 1, 2.0)
    assert costs.verify_s(1) == 2.0


def test_rows_between_measured_ones_lie_between_them():
    costs = CostModel()
    costs.add("verify", 1, 1.0)
    costs.add("verify", 5, 3.0)
    assert [costs.verify_s(rows) for rows in (1, 2, 3, 5, 9)] == [1.0, 1.5, 2.0, 3.0, 3.0]


def test_fewer_rows_are_never_assumed_to_take_longer_than_more():
    costs = CostModel()
    for rows, seconds in ((1, 1.0), (2, 9.0), (4, 2.0)):
        costs.add("verify", rows, seconds)
    assert costs.verify_s(2) == 2.0


def test_nothing_known_costs_nothing():
    assert CostModel().verify_s(3) == CostModel().draft_s("model") == 0.0
    assert CostModel().prefill_s("model") is None


def test_forwards_that_compute_the_same_rows_are_one_cost():
    costs = CostModel(lambda n: max(n, 5))
    costs.add("verify", 1, 1.0)
    costs.add("verify", 4, 3.0)
    costs.add("verify", 8, 7.0)
    assert costs.known("verify") == {5: 2.0, 8: 7.0}
    assert costs.verify_s(1) == costs.verify_s(5) == 2.0


def test_beginning_a_draft_costs_something_by_itself():
    costs = CostModel()
    assert costs.draft_s("model", 3) == costs.draft_step_s("model") == 0.0
    costs.add("draft", ("model", 2), 0.4)
    assert costs.draft_s("model", 4) == pytest.approx(0.8)  # in proportion, as long as one length is known
    for k in (1, 2, 5):
        for _ in range(9):
            costs.add("draft", ("model", k), 0.3 + 0.1 * k)
    assert costs.draft_s("model", 4) == pytest.approx(0.7, rel=0.05)
    assert costs.draft_step_s("model") == pytest.approx(0.1, rel=0.05)
    assert costs.draft_s("model", 0) == costs.draft_s("lookup", 2) == 0.0


def test_noise_makes_no_cost_negative():
    costs = CostModel()
    for k, seconds in ((1, 0.9), (2, 0.5), (4, 0.1)):
        costs.add("draft", ("model", k), seconds)
    assert costs.draft_step_s("model") == 0.0 < costs.draft_s("model", 9)


def test_rounds_of_one_program_are_timed_whole():
    costs = CostModel()
    assert costs.whole_round_s(3) is None
    costs.add("verify", 1, 1.0)
    costs.add("round", 4, 3.0)
    assert [costs.whole_round_s(k) for k in (2, 4, 6)] == [2.0, 3.0, 4.0]
    costs.add("round", 8, 4.0)
    assert costs.whole_round_s(6) == 3.5


def test_rounds_of_one_program_decide_the_length():
    """A board that has programs for 1, 3, 7 and 15 tokens, where a round takes 10 ms and 2 for each of them."""
    controller, draw = AutoDraftLength([1, 3, 7, 15]), random.Random(0)
    controller.costs.add("verify", 1, PLAIN_S)
    controller.begin(10, 10_000)
    controller.read("model", 0.0)
    for _ in range(300):
        k = controller.draft_length("model")
        accepted = 0
        while accepted < k and draw.random() < 0.8:
            accepted += 1
        controller.update(Round(k, accepted, accepted + 1, PLAIN_S + 0.002 * k if k else 0.0, 0.0 if k else PLAIN_S))
    assert controller.costs.known("verify") == {1: PLAIN_S}
    assert controller.chosen[-50:].count(3) > 25


@pytest.mark.parametrize("greedy", [True, False])
def test_measuring_times_every_row_count_with_real_forwards(greedy):
    target, _ = build_pair(seed=0, noise=None)
    costs = CostModel()
    costs.measure(target, [1, 3, 3, 5], greedy=greedy, repeats=2)
    assert list(costs.known("verify")) == [1, 3, 5]
    assert all(seconds > 0 for seconds in costs.known("verify").values())
    method = "greedy" if greedy else "forward"
    assert target.calls == [(method, rows, 0) for _ in range(3) for rows in (1, 3, 5)]


# ---- acceptance -----------------------------------------------------------------------------------------------------


def test_acceptance_begins_with_the_prior_at_every_position():
    assert Acceptance(0.6).chances(3) == [0.6, 0.6, 0.6]


def test_acceptance_by_position_is_learnt():
    acceptance, draw = Acceptance(0.6), random.Random(1)
    means = [0.0, 0.0, 0.0]
    for _ in range(3000):
        accepted = 0
        while accepted < 3 and draw.random() < (0.9, 0.5, 0.1)[accepted]:
            accepted += 1
        acceptance.add(3, accepted)
        means = [mean + chance / 3000 for mean, chance in zip(means, acceptance.chances(3), strict=True)]
    assert means == pytest.approx([0.9, 0.5, 0.1], abs=0.12)


def test_positions_never_tried_are_as_likely_as_the_last_one_tried():
    acceptance = Acceptance(0.6)
    for _ in range(50):
        acceptance.add(1, 1)
    first, *others = acceptance.chances(4)
    assert first > 0.9
    assert others == [first] * 3


def test_a_refused_token_says_nothing_about_those_after_it():
    one, two = Acceptance(0.6), Acceptance(0.6)
    one.add(1, 0)
    two.add(4, 0)
    assert one.chance(0) == two.chance(0) < 0.6


def test_old_rounds_fade():
    acceptance = Acceptance(0.6)
    for _ in range(100):
        acceptance.add(1, 1)
    for _ in range(60):
        acceptance.add(1, 0)
    assert acceptance.chance(0) < 0.2


def test_a_new_text_begins_with_what_others_have_shown():
    others = Acceptance(0.6)
    for _ in range(50):
        others.add(2, 1)
    assert Acceptance(0.6, parent=others).chances(3) == others.chances(3)
    own = Acceptance(0.6, parent=others)
    own.add(2, 2)
    assert own.chance(1) > others.chance(1)
    assert own.next_chance() > others.next_chance()


def test_a_draft_that_stops_by_itself_does_not_make_later_tokens_look_easy():
    """Every second draft stops after one token, where the next would have been refused; the others are accepted."""
    biased, corrected = Acceptance(0.6), Acceptance(0.6)
    for i in range(200):
        drafted = 1 + i % 2
        biased.add(drafted, drafted)
        corrected.add(drafted, drafted, next_chance=0.0 if drafted == 1 else None)
    assert biased.chance(1) > 0.95
    assert corrected.chance(1) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("power", [0.3, 0.65, 1.0, 2.2])
def test_trust_is_the_power_that_makes_a_drafts_probabilities_true(power):
    trust, draw, powers = Trust(), random.Random(0), []
    assert trust.power == 1.0
    for _ in range(4000):
        reach = [draw.random()]
        while len(reach) < 4:
            reach.append(reach[-1] * draw.random())
        chance = draw.random()
        trust.add(reach, sum(chance < each**power for each in reach))
        powers.append(trust.power)
    assert statistics.median(powers[1000:]) == pytest.approx(power, rel=0.1)
    assert trust.chance(0.5) == pytest.approx(0.5**trust.power)


@pytest.mark.parametrize(("accepted", "power"), [(0, Trust.POWERS[-1]), (2, Trust.POWERS[0])])
def test_trust_has_bounds(accepted, power):
    trust = Trust()
    for _ in range(500):
        trust.add([0.5, 0.25], accepted)
    assert trust.power == power


def test_trust_moves_slowly_at_first():
    trust = Trust()
    trust.add([0.9, 0.8], 0)
    assert 1.0 < trust.power < 2.0


def test_expected_tokens_against_simulation():
    chances, draw = [0.8, 0.6, 0.3], random.Random(0)
    total = 0
    for _ in range(20000):
        total += 1
        for chance in chances:
            if draw.random() >= chance:
                break
            total += 1
    assert expected_tokens(chances) == pytest.approx(total / 20000, rel=0.02)
    assert tokens_by_length(chances)[:2] == [1, 1.8]
    assert tokens_by_length([]) == [1]


# ---- decisions ------------------------------------------------------------------------------------------------------


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


# ---- several sequences in a step -------------------------------------------------------------------------------------
def joint_round(k, accepted, n, verify_s, draft_s):
    """One sequence's round in a step that n share, all drafting k tokens."""
    joint = Joint(n, n * (k + 1), 10 * n, 0, verify_s, n if k else 0, draft_s, k)
    return Round(k, accepted, accepted + 1, draft_s, verify_s, joint=joint)


def drafted_among(n, row_s, chance=0.8, step_s=0.001, steps=150):
    """Mean tokens drafted in the last steps of n texts at once, where a forward takes PLAIN_S up to 8 rows, and row_s
    more for each further row; and their tokens per second, over those of plain decoding."""
    controller, draw = AutoDraftLength(), random.Random(n)
    policies = [controller.begin(10, 10_000) for _ in range(n)]
    for policy in policies:
        policy.read("model", 0.0)

    def forward_s(rows):
        return PLAIN_S + row_s * max(0, rows - 8) + rows * 1e-9  # no two alike

    for rows in (1, 2, 4, 7, 11, *(n * each for each in (1, 2, 4, 7))):  # as `LLM.measure_costs` does
        controller.costs.add("verify", rows, forward_s(rows))
    lengths, seconds, tokens = [], 0.0, 0
    for step in range(steps):
        asked = []
        for policy in policies:
            policy.shares(n, 10 * n)
            asked.append(policy.draft_length("model"))
        verify_s, draft_s = forward_s(sum(k + 1 for k in asked)), step_s * max(asked) + step * 1e-12
        going = sum(k > 0 for k in asked)
        for policy, k in zip(policies, asked, strict=True):
            accepted = 0
            while accepted < k and draw.random() < chance:
                accepted += 1
            joint = Joint(n, sum(asked) + n, 10 * n, 0, verify_s, going if k else 0, draft_s, max(asked))
            policy.update(Round(k, accepted, accepted + 1, draft_s, verify_s, joint=joint if n > 1 else None))
            tokens += accepted + 1
        seconds += verify_s + draft_s
        lengths.append(sum(asked) / n)
    return statistics.mean(lengths[-50:]), tokens / seconds / (n / forward_s(n))


def test_drafts_grow_shorter_as_slots_fill_down_to_plain_decoding():
    free = [drafted_among(n, 0.0)[0] for n in (1, 4, 16)]
    assert min(free) > 4  # rows that cost nothing
    found = {n: drafted_among(n, 0.002) for n in (1, 2, 4, 8, 16)}
    lengths = [length for length, _ in found.values()]
    assert lengths[0] > 4 and lengths[:3] == sorted(lengths[:3], reverse=True) and max(lengths[3:]) < 0.2, lengths
    assert all(speed > 0.97 for _, speed in found.values()), found
    assert found[1][1] > 2


def test_a_forward_that_several_share_is_one_measurement():
    controller = AutoDraftLength()
    policies = [controller.begin(10, 100) for _ in range(8)]
    for policy in policies:
        policy.shares(8, 80)
        policy.update(joint_round(2, 1, 8, 0.5, 0.1))
    controller.update(joint_round(2, 1, 8, 0.1, 0.02))
    assert controller.costs.verify_s(24) == pytest.approx(0.3)  # of two, not of nine
    assert controller.costs.draft_s("model", 2, 8) == pytest.approx(0.06)
    assert controller.draft_s("model", 2, 8) == pytest.approx(0.06 / 8)


def test_prompts_beside_it_say_nothing_about_what_a_forward_costs():
    controller = AutoDraftLength()
    policy = controller.begin(10, 100)
    policy.update(Round(0, 0, 1, 0.0, 0.9, joint=Joint(2, 2, 20, 300, 0.9, 0, 0.0, 0)))
    assert controller.costs.known("verify") == {}


def test_costs_go_by_context_and_are_scaled_where_they_are_not_known():
    costs = CostModel()
    for rows, seconds in ((1, 1.0), (4, 1.5), (8, 3.0)):
        costs.add("verify", rows, seconds, 100)
    costs.add("verify", 1, 2.0, 5000)
    assert [costs.verify_s(rows, 900) for rows in (1, 4, 8)] == [1.0, 1.5, 3.0]
    assert [costs.verify_s(rows, 4500) for rows in (1, 4, 8)] == [2.0, 3.0, 6.0]
    costs.add("verify", 8, 10.0, 5000)
    assert costs.verify_s(8, 8000) == 10.0 and costs.verify_s(8, 10) == 3.0
