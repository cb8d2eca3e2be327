"""What forwards and drafts cost, learnt from rounds and times made up here."""

import random

import pytest

from models.speculative.control.costs import CostModel
from models.speculative.control.policy import AutoDraftLength
from models.speculative.stats import Round
from models.tests.engine_fixtures import build_pair

PLAIN_S = 0.010


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
