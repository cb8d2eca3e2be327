"""What is known of acceptance by position, and how far a draft's own probabilities are trusted."""

import random
import statistics

import pytest

from models.speculative.control.estimates import Acceptance, Trust
from models.speculative.formulas import expected_tokens, tokens_by_length


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
