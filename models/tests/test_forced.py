"""Acceptance by decree: what is proposed, and that texts stay what they are."""

import pytest

from models.errors import UserError
from models.llm import LLM
from models.speculative.drafters.forced import ForcedDrafter, parsed_forced
from models.speculative.drafters.registry import FORCED, names, specs
from models.tests.engine_fixtures import upto
from models.tests.llama_fixtures import tiny_config, write_tiny_checkpoint

PROMPT, TEXT = [7, 8, 9], list(range(10, 60))


@pytest.mark.parametrize("text, acceptance", [("0.8", 0.8), ("1", 1.0), ("3,0,4", (3, 0, 4))])
def test_a_chance_or_depths_are_read(text, acceptance):
    assert parsed_forced(text) == acceptance


@pytest.mark.parametrize("text", ["", "x", "-0.1", "1.5", "nan", "3,32", "1,-1", "1,x"])
def test_anything_else_is_refused_in_one_line(text):
    with pytest.raises(UserError, match="forced acceptance .*: give a chance from 0 to 1"):
        parsed_forced(text)


def right(tokens, done):
    """How many of proposed tokens are those that follow."""
    return next((i for i, token in enumerate(tokens) if token != TEXT[done + i]), len(tokens))


def test_each_token_is_right_with_the_chance_that_was_asked_for():
    kept = tried = 0
    for seed in range(60):
        drafter = ForcedDrafter(TEXT, len(PROMPT), 0.7, 128, seed)
        for done in range(1, 40):
            draft = drafter.propose([*PROMPT, *TEXT[:done]], upto(4))
            accepted = right(draft.tokens, done)
            assert len(draft.tokens) == 4 and draft.source == "forced"
            kept, tried = kept + accepted, tried + min(accepted + 1, 4)
    assert kept / tried == pytest.approx(0.7, abs=0.015)


def test_depths_are_those_of_the_rounds_in_turn():
    drafter = ForcedDrafter(TEXT, len(PROMPT), (3, 0, 9), 128)
    rounds = [right(drafter.propose([*PROMPT, *TEXT[:done]], upto(5)).tokens, done) for done in range(1, 7)]
    assert rounds == [3, 0, 5, 3, 0, 5]


def test_what_is_proposed_depends_on_the_place_and_the_seed_alone():
    tokens = [*PROMPT, *TEXT[:9]]
    used = ForcedDrafter(TEXT, len(PROMPT), 0.5, 128, 3)
    for done in range(1, 9):
        used.propose([*PROMPT, *TEXT[:done]], upto(done))
    assert used.propose(tokens, upto(6)) == ForcedDrafter(TEXT, len(PROMPT), 0.5, 128, 3).propose(tokens, upto(6))


def test_nothing_is_proposed_where_nothing_is_known():
    drafter = ForcedDrafter(TEXT[:5], len(PROMPT), 1.0, 128)
    assert drafter.propose(PROMPT, upto(4)).tokens == []
    assert drafter.propose([*PROMPT, 99], upto(4)).tokens == []  # another text than the recorded one
    assert drafter.propose([*PROMPT, *TEXT[:3]], upto(4)).tokens == TEXT[3:5]
    assert drafter.propose([*PROMPT, *TEXT[:5]], upto(4)).tokens == []


def test_it_is_no_choice_among_drafters():
    assert FORCED not in names() and FORCED not in [spec.name for spec in specs()]


def test_texts_are_plain_ones_and_acceptance_what_was_asked_for(tmp_path):
    target = write_tiny_checkpoint(tmp_path / "target", tiny_config())
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    for acceptance, expected in ((1.0, 1.0), (0.0, 0.0), (0.5, None)):
        options = {
            "drafter": FORCED,
            "force_acceptance": acceptance,
            "num_draft_tokens": 3,
            "dtype": "fp32",
            "slots": 2,
        }
        with LLM.load(str(target), **options) as llm:
            plain = [each.token_ids for each in llm.generate(prompts, max_new_tokens=30, stop_ids=(), speculate=False)]
            forced = [each.token_ids for each in llm.generate(prompts, max_new_tokens=30, stop_ids=())]
            assert forced == plain
            rate = llm.stats.acceptance_rate
            assert rate == expected if expected is not None else 0.15 < rate < 0.5


def test_it_needs_greedy_texts_and_to_be_told_how_often(tmp_path):
    for options in ({}, {"force_acceptance": 0.5, "greedy": False}):
        with pytest.raises(UserError, match="force_acceptance"):
            LLM.load("tiny", drafter=FORCED, **options)
    with pytest.raises(UserError, match="force_acceptance has no meaning with drafter model"):
        LLM.load("tiny", drafter="model", force_acceptance=0.5)
