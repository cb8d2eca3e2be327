"""The controller's rules where several sequences share a step, on rounds and times made up here."""

import random
import statistics

import pytest

from models.speculative.control.costs import CostModel
from models.speculative.control.policy import AutoDraftLength
from models.speculative.stats import Joint, Round

PLAIN_S = 0.010


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
        return PLAIN_S + row_s * max(0, rows - 8)

    for rows in (1, 2, 4, 7, 11, *(n * each for each in (1, 2, 4, 7))):  # as `LLM.measure_costs` does
        controller.costs.add("verify", rows, forward_s(rows))
    lengths, seconds, tokens = [], 0.0, 0
    for step in range(steps):
        asked = []
        for policy in policies:
            policy.shares(n, 10 * n)
            asked.append(policy.draft_length("model"))
        verify_s = forward_s(sum(k + 1 for k in asked)) + step * 1e-12  # no two alike
        draft_s = step_s * max(asked) + step * 1e-12
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


def test_texts_that_draft_look_now_and_then_at_what_plain_steps_cost_now():
    """Rows seemed free because the machine was busy while plain steps were timed."""
    controller = AutoDraftLength()
    policies = [controller.begin(10, 10_000) for _ in range(4)]
    for rows in (4, 8, 16, 28):
        controller.costs.add("verify", rows, 0.020)
    plain = []
    for step in range(120):
        asked = []
        for policy in policies:
            policy.shares(4, 40)
            asked.append(policy.draft_length("lookup"))
        plain.append(not any(asked))
        verify_s = (0.010 if plain[-1] else 0.020) + step * 1e-9
        for policy, k in zip(policies, asked, strict=True):
            joint = Joint(4, 4 + sum(asked), 40, 0, verify_s, 0, 0.0, 0)
            policy.update(Round(k, 0, 1, 0.0, verify_s, source="lookup", joint=joint))
    assert not any(plain[:5]) and sum(plain[60:]) > 50
