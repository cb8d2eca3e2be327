"""The choice of the layers of early exit: by hand, and on real models."""

from collections import Counter
from pathlib import Path

import pytest

from models.errors import UserError
from models.loading import load_model, open_model
from models.speculative.drafters import early_exit
from models.speculative.drafters.early_exit import (
    ExitMeasurements,
    best_exit,
    choose_exit,
    exit_candidates,
    measure_exits,
    tokens_per_round,
)
from models.tests.early_exit_fixtures import Counting, early_text, weak_tail
from models.tests.engine_fixtures import build, engine_config, plain, random_prompt
from models.tests.llama_fixtures import random_tensors

TINY_TARGET = Path(__file__).parents[1] / "checkpoints" / "tiny-target"

pytestmark = pytest.mark.usefixtures("one_thread")


def test_candidates_are_all_of_a_shallow_model_and_some_of_a_deep_one():
    assert exit_candidates(1) == []
    assert exit_candidates(2) == [1]
    assert exit_candidates(16) == list(range(1, 16))
    assert exit_candidates(28) == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert exit_candidates(32) == [1, 2, 3, 4, 6, 8, 12, 16, 24]


@pytest.mark.parametrize("agreed, k, rounds", [
    ("1111", 1, 2), ("1111", 3, 1), ("1111", 4, 1), ("1111", 2, 2), ("0000", 3, 4), ("1010", 2, 2), ("0101", 2, 3),
    ("1101110", 2, 3), ("1101110", 6, 2), ("1", 6, 1), ("0", 1, 1),
])  # fmt: skip
def test_rounds_are_replayed_by_hand(agreed, k, rounds):
    assert tokens_per_round([mark == "1" for mark in agreed], k) == len(agreed) / rounds


def measured(agreed, step_s, verify_s) -> ExitMeasurements:
    return ExitMeasurements({e: tuple(m == "1" for m in marks) for e, marks in agreed.items()}, step_s, verify_s)


def test_the_choice_by_hand():
    """12 tokens take plain decoding 12 s, layer 1 with K = 1 nine rounds of 1.1 s, layer 3 with K = 2 four of 1.8 s."""
    agreed = {1: "100010001000", 3: "110110110110", 5: "111111111111"}
    choice = best_exit(measured(agreed, {1: 0.1, 3: 0.3, 5: 0.9}, {1: 1.0, 2: 1.0, 3: 1.2}))
    assert (choice.exit_layer, choice.draft_length, choice.measured_tokens) == (3, 2, 12)
    assert choice.speed_up == pytest.approx(12 / (4 * (2 * 0.3 + 1.2)))
    one, three, five = choice.candidates
    assert [one.exit_layer, three.exit_layer, five.exit_layer] == [1, 3, 5]
    assert one.agreement == 0.25 and three.agreement == pytest.approx(2 / 3) and five.agreement == 1
    assert one.tokens_per_round == {1: 12 / 9, 2: 12 / 9} and five.tokens_per_round == {1: 2, 2: 3}
    assert one.speed_ups == pytest.approx({1: 12 / (9 * 1.1), 2: 12 / (9 * 1.4)})
    assert (one.draft_length, one.speed_up) == (1, one.speed_ups[1])
    assert five.speed_ups == pytest.approx({1: 2 / 1.9, 2: 3 / 3.0})


def test_where_nothing_pays_the_choice_still_names_the_best():
    agreed = {1: "000000", 2: "010000", 3: "010101"}
    choice = best_exit(measured(agreed, {1: 0.2, 2: 0.3, 3: 0.9}, {1: 1.0, 2: 1.1}))
    assert (choice.exit_layer, choice.draft_length) == (2, 1)
    assert choice.speed_up == pytest.approx(6 / 5 / 1.4) and choice.speed_up < 1


def test_of_equal_choices_the_first_layer_and_the_shortest_draft():
    choice = best_exit(measured({4: "0000", 2: "0000"}, {4: 0.0, 2: 0.0}, {1: 1.0, 2: 1.0, 3: 1.0}))
    assert (choice.exit_layer, choice.draft_length, choice.speed_up) == (2, 1, 1.0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_measured_agreement_foretells_the_rounds_of_a_real_run(k):
    """Exactly: what counts as agreement is what a round accepts."""
    for seed, fixed_rows in enumerate((None, 8, 6)):
        target = weak_tail(4, 2, seed, scale=0.3, fixed_rows=fixed_rows)
        prompt = random_prompt(7, seed)
        text = prompt + plain(target, prompt, max_new_tokens=80)
        target.prefill(random_prompt(90, seed=5))  # its cache holds something else
        result = measure_exits(target, text, len(prompt), [k])
        assert list(result.agreed) == list(result.step_s) == [1, 2, 3] and list(result.verify_s) == [1, k + 1]
        assert min([*result.step_s.values(), *result.verify_s.values()]) > 0
        for exit_layer, agreed in result.agreed.items():
            ids, stats = early_text(target, exit_layer, prompt, k, max_new_tokens=80)
            assert prompt + ids == text
            assert len(agreed) == 79
            assert tokens_per_round(agreed, k) == 79 / len(stats.rounds)
        assert 0 < sum(result.agreed[2]) < 79


def test_measuring_leaves_nothing_that_a_later_text_could_see():
    target = weak_tail(3, 1, seed=3, max_seq_len=40)
    prompt = random_prompt(5, seed=3)
    text = prompt + plain(target, prompt)  # fills the context
    assert len(text) == 40
    choose_exit(target, text, len(prompt))
    assert early_text(target, 1, prompt)[0] == text[5:]


def test_times_are_of_whole_forwards_and_of_single_steps():
    """No verification that is timed goes on from a draft; rows of padded forwards are timed once."""
    for fixed_rows, expected in ((None, {1, 2, 4}), (4, {1})):
        target = weak_tail(3, 1, seed=3, fixed_rows=fixed_rows)
        prompt = random_prompt(5, seed=3)
        text = prompt + plain(target, prompt, max_new_tokens=9)
        target.calls.clear()
        target.layers[0].qkv = counter = Counting(target.layers[0].qkv)
        result = measure_exits(target, text, len(prompt), [1, 3, 7, 40] if fixed_rows else [1, 3])
        assert list(result.verify_s) == [1, 2, 4]
        repeats = early_exit.REPEATS + 1
        forwards = Counter(rows for method, rows, _ in target.calls if method == "greedy")
        assert forwards == dict.fromkeys(expected, repeats)
        timed = Counter(counter.rows[-repeats * (len(expected) + 2) :])  # two exit layers
        assert timed == ({4: 3 * repeats} if fixed_rows else {1: 3 * repeats, 2: repeats, 4: repeats})


def test_a_choice_on_the_embedded_target():
    """Its last layers add little, its first ones know little: later exits agree more, on the text it writes."""
    opened = open_model(str(TINY_TARGET))
    target = load_model(opened, dtype="bf16", fixed_rows=7, max_seq_len=128).model
    prompt = opened.tokenizer.encode("def add(a, b):\n")
    ids, _ = early_text(target, 13, prompt, max_new_tokens=40)
    assert ids == plain(target, prompt, max_new_tokens=40)
    choice = choose_exit(target, prompt + ids, len(prompt), candidates=[2, 13])
    assert [candidate.exit_layer for candidate in choice.candidates] == [2, 13]
    shallow, deep = choice.candidates
    assert shallow.agreement < 0.3 and deep.agreement > 0.6
    assert choice.measured_tokens == 39 and list(deep.speed_ups) == [1, 2, 3, 4, 5, 6]
    assert choice.speed_up == max(shallow.speed_up, deep.speed_up) > 0


def test_what_cannot_be_chosen_is_refused():
    target = weak_tail(3, 1, seed=3, fixed_rows=4)
    text = random_prompt(20, seed=1)
    for prompt_length in (0, 19, 20):
        with pytest.raises(UserError, match="too short to choose an exit layer"):
            choose_exit(target, text, prompt_length)
    with pytest.raises(UserError, match="no draft length between 1 and 3"):
        choose_exit(target, text, 5, lengths=[0, 4, 9])
    with pytest.raises(UserError, match="exit layer 3"):
        choose_exit(target, text, 5, candidates=[1, 3])
    with pytest.raises(UserError, match="a model of one layer"):
        choose_exit(build(engine_config(layers=1), random_tensors(engine_config(layers=1), 0)), text, 5)
